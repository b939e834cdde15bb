"""What attention refuses, by name, in the door and in the plan."""

import pytest
import torch

from flashtensors.errors import ConfigError
from flashtensors.kernels.attention import call as attention_call
from flashtensors.kernels.attention import work as attention_work
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.reference import ragged_attention_reference
from flashtensors.kernels.attention.work import AttentionWork

from ..tolerances import DEVICE
from .cases import FP8, Case, to_device

SHAPE = {
    "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "max_seqs": 2, "max_tokens": 4, "device": DEVICE,
    "dtype": torch.float32,
}  # fmt: skip

OPTIONS = {
    "sinks_H": torch.zeros(4),
    "tree_mask_T": torch.ones(4, dtype=torch.int64),
    "lse_TH": torch.zeros(4, 4),
}
SCALES = {"k_scales_K": torch.ones(2), "v_scales_K": torch.ones(2)}


class Call:
    """Arguments that fit; a test changes one of them."""

    def __init__(self, *, is_fp8=False) -> None:
        case = Case([70, 33], [1, 3], 4, 2, 64, 16, torch.float32)
        caches = [cache.nan_to_num().to(FP8) if is_fp8 else cache for cache in (case.k, case.v)]
        arguments = {
            "q_THD": case.q, "k_cache": caches[0], "v_cache": caches[1], "block_tables": case.tables,
            "out_THD": torch.empty_like(case.q), **OPTIONS, **(SCALES if is_fp8 else {}),
        }  # fmt: skip
        self.arguments = {name: to_device(x) for name, x in arguments.items()}
        self.work = case.work(kv_dtype=caches[0].dtype)
        self.starts, self.lengths = to_device(case.starts), to_device(case.kv_lengths)

    def run(self, *, max_query_tokens=3, softcap=None):
        self.work.plan(self.starts, self.lengths, max_query_tokens=max_query_tokens)
        return ragged_attention(**self.arguments, work=self.work, scale=0.1, softcap=softcap)


CHANGES = {
    "narrow queries": ("q_THD", lambda q: q[:, :, :32], r"\[T, 4, 64\]"),
    "half queries": ("q_THD", lambda q: q.half(), "torch.float32"),
    "permuted cache": ("v_cache", lambda v: v.transpose(1, 2), "as k_cache"),
    "strided cache": ("k_cache", lambda k: k.repeat(1, 1, 1, 2)[..., :64], "contiguous"),
    "half cache": ("v_cache", lambda v: v.half(), "torch.float32"),
    "short cache": ("v_cache", lambda v: v[:-1], "as k_cache"),
    "half output": ("out_THD", lambda out: out.half(), "as q_THD"),
    "short output": ("out_THD", lambda out: out[:3], "as q_THD"),
    "long tables": ("block_tables", lambda tables: tables.long(), "torch.int32"),
    "flat tables": ("block_tables", lambda tables: tables.flatten(), r"\[2, B\]"),
    "too few tables": ("block_tables", lambda tables: tables[:1], "a row for each sequence"),
    "transposed tables": ("block_tables", lambda tables: tables.T.contiguous().T, "rows contiguous"),
    "one sink": ("sinks_H", lambda sinks: sinks[:1], r"\[4\]"),
    "sinks of ints": ("sinks_H", lambda sinks: sinks.long(), "torch.bfloat16"),
    "strided sinks": ("sinks_H", lambda sinks: sinks.repeat(2)[::2], "contiguous"),
    "short tree": ("tree_mask_T", lambda tree: tree[:3], r"\[4\]"),
    "tree of int32": ("tree_mask_T", lambda tree: tree.int(), "torch.int64"),
    "lse of one row": ("lse_TH", lambda lse: lse[:1], r"\[4, 4\]"),
    "transposed lse": ("lse_TH", lambda lse: lse.T, "contiguous"),
    "half lse": ("lse_TH", lambda lse: lse.half(), "torch.float32"),
}


@pytest.mark.parametrize(("name", "change", "wanted"), CHANGES.values(), ids=CHANGES.keys())
def test_what_does_not_fit_is_named(name, change, wanted):
    call = Call()
    call.run()
    call.arguments[name] = change(call.arguments[name])
    with pytest.raises(ConfigError, match=f"^{name} is .* but it must be .*{wanted}") as refused:
        call.run()
    assert refused.value.param == name


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "block_tables", "out_THD", *OPTIONS])
def test_tensors_of_another_device_are_refused(name):
    call = Call()
    call.arguments[name] = call.arguments[name].to("meta")
    with pytest.raises(ConfigError, match=f"^{name} is on meta, but it must be on {DEVICE}"):
        call.run()


@pytest.mark.parametrize("name", SCALES)
def test_scales_must_fit_and_come_together(name):
    Call(is_fp8=True).run()
    call = Call(is_fp8=True)
    for wrong, wanted in ((torch.ones(1), r"\[2\]"), (torch.ones(2).half(), "float32"), (torch.ones(4)[::2], "contig")):
        call.arguments[name] = to_device(wrong)
        with pytest.raises(ConfigError, match=f"^{name} is .*{wanted}"):
            call.run()
    del call.arguments[name]
    with pytest.raises(ConfigError, match=f"is given without {name}"):
        call.run()


def test_scales_of_caches_that_are_not_fp8_are_refused():
    call = Call()
    call.arguments |= {name: to_device(x) for name, x in SCALES.items()}
    with pytest.raises(ConfigError, match=r"caches are torch\.float32; leave them out"):
        call.run()


@pytest.mark.parametrize("most", [None, 17])
def test_a_tree_mask_needs_a_bound_of_new_tokens(most):
    call = Call()
    call.run(max_query_tokens=16)
    with pytest.raises(ConfigError, match=r"tree_mask_T is .* at most 16 new tokens.*max_query_tokens"):
        call.run(max_query_tokens=most)
    del call.arguments["tree_mask_T"]
    call.run(max_query_tokens=most)


def test_batches_beyond_the_work_are_refused():
    case = Case([70, 33], [1, 3], 4, 2, 64, 16, torch.float32)
    with pytest.raises(ConfigError, match=r"2 sequences, but the work was made for at most 1; .*max_seqs"):
        case.run(work=AttentionWork(**SHAPE | {"max_seqs": 1}))
    with pytest.raises(ConfigError, match="q_THD is 4 rows, but it must be at most 3 rows, max_tokens"):
        case.run(work=AttentionWork(**SHAPE | {"max_tokens": 3}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0), ("num_heads", 3), ("num_heads", 34), ("num_kv_heads", 0), ("num_kv_heads", -2),
        ("head_dim", 0), ("head_dim", -64), ("head_dim", 8), ("max_seqs", 0), ("max_seqs", 4097), ("max_tokens", 0),
        ("max_groups", -1), ("dtype", torch.float64), ("dtype", FP8), ("kv_dtype", torch.float8_e5m2),
        ("kv_dtype", torch.bfloat16), ("sliding_window", 0), ("sliding_window", -1),
    ],
)  # fmt: skip
def test_works_that_no_kernel_computes_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is {value}, but it must be ") as refused:
        AttentionWork(**SHAPE | {name: value})
    assert refused.value.param == name


def test_a_deterministic_work_needs_a_longest_sequence():
    with pytest.raises(ConfigError, match="needs max_kv_length") as refused:
        AttentionWork(**SHAPE, is_deterministic=True)
    assert refused.value.param == "max_kv_length"


@pytest.mark.parametrize("softcap", [0.0, -5.0, float("inf"), float("nan")])
def test_a_soft_cap_that_bounds_nothing_is_refused(softcap):
    call = Call()
    call.run(softcap=30.0)
    with pytest.raises(ConfigError, match=r"^softcap is .* or None for unbounded scores") as refused:
        call.run(softcap=softcap)
    assert refused.value.param == "softcap"
    del call.arguments["out_THD"]
    with pytest.raises(ConfigError, match=r"^softcap is"):
        ragged_attention_reference(**call.arguments, work=call.work, scale=0.1, softcap=softcap)


@pytest.mark.parametrize(
    ("starts", "lengths", "wanted"),
    [
        (torch.zeros(3), torch.zeros(2, dtype=torch.int32), r"query_starts is torch.float32 \[3\]"),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), r"kv_lengths is .* torch.int32 \[2\]"),
        (torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), r"query_starts is .* torch.int32 \[1\]"),
        (torch.zeros(3, dtype=torch.int32, device="meta"), torch.zeros(2, dtype=torch.int32), "query_starts.*on meta"),
        (torch.zeros(5, dtype=torch.int32)[::2], torch.zeros(2, dtype=torch.int32), "query_starts .* be contiguous"),
        (torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)[::2], "kv_lengths .* be contiguous"),
    ],
    ids=["floats", "a length too many", "no starts", "another device", "strided starts", "strided lengths"],
)
def test_lengths_that_do_not_fit_are_refused(starts, lengths, wanted):
    starts, lengths = (x if x.is_meta else x.to(DEVICE) for x in (starts, lengths))
    with pytest.raises(ConfigError, match=wanted):
        Call().work.plan(starts, lengths)


@pytest.mark.parametrize("has_kernels", [False, True])
@pytest.mark.parametrize(
    "groups",
    [
        torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32),
        torch.zeros(3, 2, dtype=torch.int32).T, torch.zeros(2, 3, dtype=torch.int32)[:, None],
        torch.zeros(17, 3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32, device="meta"),
    ],
    ids=["floats", "pairs", "flat", "transposed", "three dims", "too many", "another device"],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(groups, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(attention_work, "runs_triton", lambda device: False)
    call = Call()
    with pytest.raises(ConfigError, match=r"^groups is .* but it must be ") as refused:
        call.work.plan(call.starts, call.lengths, groups=groups if groups.is_meta else groups.to(DEVICE))
    assert refused.value.param == "groups"


@pytest.mark.multi_gpu
def test_lengths_on_another_gpu_are_refused():
    call = Call()
    call.run()
    with pytest.raises(ConfigError, match=r"query_starts .* on cuda:1, but it must be .* on cuda:0"):
        call.work.plan(call.starts.to("cuda:1"), call.lengths)


def test_a_work_without_a_plan_is_refused():
    call = Call()
    with pytest.raises(ConfigError, match=r"call work\.plan"):
        ragged_attention(**call.arguments, work=call.work, scale=0.1)


def test_the_layers_of_a_step_are_checked_once(monkeypatch):
    call, checks = Call(), []
    check = attention_call._check_rows
    monkeypatch.setattr(attention_call, "_check_rows", lambda *args: checks.append(1) or check(*args))
    for _ in range(3):
        call.run()
    assert len(checks) == 1
    call.arguments["lse_TH"] = None
    call.run()
    assert len(checks) == 2
