"""The attention entry for GPUs against its definition in fp64, under Triton's interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from flashtensors.errors import ConfigError
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork

from ..tolerances import DEVICE, assert_near

DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
"""The interpreter's dot accumulates fp16 as the GPU does not, and its bf16 is wrong: those run on a GPU."""


class Case:
    """Random queries and a cache whose unused slots are NaN; sequence s has `lengths[s]` tokens, the last are new."""

    def __init__(self, lengths, new_tokens, heads, kv_heads, head_dim, page, dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.new_tokens, self.page = lengths, new_tokens, page
        num_pages = [max(1, -(-length // page)) for length in lengths]
        total = sum(num_pages) + 3
        order = torch.randperm(total, generator=generator).int()
        self.tables = torch.full((len(lengths), max(num_pages)), int(order[-1]), dtype=torch.int32)
        is_used = torch.zeros(total, page, dtype=torch.bool)
        begin = 0
        for s, count in enumerate(num_pages):
            self.tables[s, :count] = order[begin : begin + count]
            begin += count
            for p in range(lengths[s]):
                is_used[self.tables[s, p // page], p % page] = True
        self.k, self.v = (
            torch.randn(total, kv_heads, page, head_dim, generator=generator)
            .masked_fill(~is_used[:, None, :, None], float("nan"))
            .to(dtype)
            for _ in range(2)
        )
        self.starts = torch.tensor([0, *torch.tensor(new_tokens).cumsum(0)], dtype=torch.int32)
        self.q = torch.randn(sum(new_tokens), heads, head_dim, generator=generator).to(dtype)
        self.kv_lengths = torch.tensor(lengths, dtype=torch.int32)

    def work(self, **options) -> AttentionWork:
        _, heads, head_dim = self.q.shape
        return AttentionWork(
            num_heads=heads, num_kv_heads=self.k.shape[1], head_dim=head_dim, max_seqs=len(self.lengths),
            max_tokens=len(self.q), device=DEVICE, dtype=self.q.dtype, max_kv_length=max(self.lengths), **options,
        )  # fmt: skip

    def run(self, *, kv_starts=None, work=None, **options):
        """Output and lse, computed twice over the same work: what the first run leaves must not harm the second."""
        named = {"sliding_window", "is_causal", "is_deterministic"}
        work = work or self.work(**{name: options.pop(name) for name in named & options.keys()})
        lse = torch.full(self.q.shape[:2], float("nan"), device=DEVICE)
        on_device = {name: _to(value) for name, value in options.items()}
        for _ in range(2):
            work.plan(_to(self.starts), _to(self.kv_lengths), kv_starts=_to(kv_starts))
            out = ragged_attention(
                _to(self.q), _to(self.k), _to(self.v), _to(self.tables), work, scale=0.1, lse_TH=lse, **on_device
            )
        assert not work.short.arrivals.any(), "a merge was left unfinished"
        return out.cpu(), lse.cpu()

    def expected(self, *, sliding_window=None, is_causal=True, softcap=None, sinks_H=None, tree_mask_T=None,
                 kv_starts=None, is_deterministic=False):  # fmt: skip
        out = torch.zeros(self.q.shape, dtype=torch.float64)
        lse = torch.full(self.q.shape[:2], float("-inf"), dtype=torch.float64)
        group = self.q.shape[1] // self.k.shape[1]
        for s, (length, count) in enumerate(zip(self.lengths, self.new_tokens, strict=True)):
            n = torch.arange(length)
            pages = self.tables[s, n // self.page].long()
            k_LKD, v_LKD = (cache[pages, :, n % self.page].double() for cache in (self.k, self.v))
            for i in range(count):
                row, position = int(self.starts[s]) + i, length - count + i
                is_seen = n >= (0 if kv_starts is None else int(kv_starts[s]))
                if tree_mask_T is not None:
                    drafted = n - (length - count)
                    is_seen &= (drafted < 0) | ((int(tree_mask_T[row]) >> drafted.clamp(min=0)) & 1).bool()
                elif is_causal:
                    is_seen &= n <= position
                if sliding_window is not None:
                    is_seen &= n > position - sliding_window
                for head in range(self.q.shape[1]):
                    scores = k_LKD[is_seen, head // group] @ self.q[row, head].double() * 0.1
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    extra = scores.new_empty(0) if sinks_H is None else sinks_H[head : head + 1].double()
                    every = torch.cat([scores, extra])
                    if every.numel():
                        shares = torch.softmax(every, 0)[: scores.numel()]
                        out[row, head] = shares @ v_LKD[is_seen, head // group]
                        lse[row, head] = torch.logsumexp(every, 0)
        return out, lse


def _to(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def _assert_close(got, expected) -> None:
    assert_near(got[0], expected[0], "attention")
    assert_near(got[1], expected[1], "log-sum-exp")


SHAPES = {
    "decode": ([70, 1, 33], [1, 1, 1], 8, 2, 64, 16),
    "odd group": ([150, 40, 18], [20, 1, 18], 6, 2, 64, 32),
    "one head each": ([150, 40, 18], [20, 1, 18], 4, 4, 128, 64),
    "one key head": ([90, 30], [30, 30], 4, 1, 128, 128),
    "wide heads": ([90, 30], [30, 30], 2, 2, 256, 64),
    "head dim 80": ([90, 30], [30, 30], 2, 1, 80, 16),
    "head dim 96": ([40, 30], [1, 30], 2, 1, 96, 32),
    "empty sequences": ([0, 5, 0], [1, 2, 1], 4, 2, 64, 16),
    "one page": ([64], [3], 4, 2, 64, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_definition(shape, dtype):
    case = Case(*shape, dtype)
    _assert_close(case.run(), case.expected())


OPTIONS = {
    "window": {"sliding_window": 24},
    "soft cap": {"softcap": 2.0},
    "sinks": {"sinks_H": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "not causal": {"is_causal": False},
    "deterministic": {"is_deterministic": True},
    "own part of a shared prefix": {"kv_starts": torch.tensor([64, 32, 16], dtype=torch.int32)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_equal_the_definition(options, dtype):
    case = Case([150, 40, 64], [20, 3, 18], 4, 2, 64, 16, dtype)
    _assert_close(case.run(**options), case.expected(**options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page"), [(4, 2, 64, 16), (3, 3, 128, 64), (4, 1, 256, 128)])
def test_many_rows_equal_the_definition(options, dtype, heads, kv_heads, head_dim, page):
    options = {**options, "sinks_H": options["sinks_H"][:heads]} if "sinks_H" in options else options
    if "kv_starts" in options:
        options = {"kv_starts": torch.tensor([256, 128, 128], dtype=torch.int32)}
    case = Case([1500, 400, 180], [200, 3, 50], heads, kv_heads, head_dim, page, dtype)
    _assert_close(case.run(**options), case.expected(**options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tree_mask(dtype):
    case = Case([150, 40], [8, 5], 4, 2, 64, 16, dtype)
    tree = {"tree_mask_T": torch.tensor([1, 3, 5, 11, 17, 33, 65, 255, 1, 3, 7, 9, 17])}
    _assert_close(case.run(**tree), case.expected(**tree))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_prefix_and_own_part_add_up(dtype):
    case = Case([150, 150, 150], [1, 1, 1], 4, 2, 64, 16, dtype)
    case.tables[:, :4] = case.tables[0, :4].clone()
    prefix = case.work(is_causal=False)
    group = torch.tensor([0, 3], dtype=torch.int32, device=DEVICE)
    prefix.plan(group, torch.tensor([64], dtype=torch.int32, device=DEVICE))
    lse = torch.empty(3, 4, device=DEVICE)
    shared = ragged_attention(_to(case.q), _to(case.k), _to(case.v), _to(case.tables), prefix, scale=0.1, lse_TH=lse)
    got = case.run(kv_starts=torch.full((3,), 64, dtype=torch.int32), carry=(shared, lse)) if DEVICE == "cpu" else None
    if got is None:
        work = case.work()
        work.plan(
            _to(case.starts), _to(case.kv_lengths), kv_starts=torch.full((3,), 64, dtype=torch.int32, device=DEVICE)
        )
        total = torch.empty(3, 4, device=DEVICE)
        out = ragged_attention(
            _to(case.q), _to(case.k), _to(case.v), _to(case.tables), work, scale=0.1, carry=(shared, lse), lse_TH=total
        )
        got = out.cpu(), total.cpu()
    _assert_close(got, case.expected())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_result_does_not_depend_on_the_batch(dtype):
    case = Case([150, 1500, 70], [1, 1, 20], 4, 2, 64, 16, dtype)
    together, _ = case.run(is_deterministic=True)
    alone = Case([150, 1500, 70], [1, 1, 20], 4, 2, 64, 16, dtype)
    for s, rows in enumerate([slice(0, 1), slice(1, 2), slice(2, 22)]):
        work = AttentionWork(
            num_heads=4, num_kv_heads=2, head_dim=64, max_seqs=1, max_tokens=32, device=DEVICE, dtype=dtype,
            is_deterministic=True, max_kv_length=1500,
        )  # fmt: skip
        starts = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        work.plan(_to(starts), _to(alone.kv_lengths[s : s + 1].clone()))
        table = _to(alone.tables[s : s + 1].clone())
        out = ragged_attention(_to(alone.q[rows].clone()), _to(alone.k), _to(alone.v), table, work, scale=0.1)
        assert torch.equal(out.cpu(), together[rows])


@pytest.mark.gpu
def test_one_graph_serves_any_lengths():
    first = Case([1500, 400, 180], [1, 1, 1], 4, 2, 128, 64, torch.bfloat16)
    q, k, v, tables = map(_to, (first.q, first.k, first.v, first.tables))
    starts, lengths, work = _to(first.starts), _to(first.kv_lengths), first.work()
    out = torch.empty_like(q)

    def step() -> None:
        work.plan(starts, lengths, max_query_tokens=1)
        ragged_attention(q, k, v, tables, work, scale=0.1, out_THD=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first.lengths = [900, 399, 2]
    lengths.copy_(torch.tensor(first.lengths))
    graph.replay()
    assert_near(out.cpu(), first.expected()[0], "attention")


def test_no_rows_is_no_work():
    case = Case([5], [1], 4, 2, 64, 16, torch.float32)
    work = case.work()
    work.plan(torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE))
    out = ragged_attention(_to(case.q[:0]), _to(case.k), _to(case.v), _to(case.tables[:0]), work, scale=0.1)
    assert out.shape == (0, 4, 64)


def test_query_rows_may_be_strided():
    case = Case([70, 33], [1, 1], 4, 2, 64, 16, torch.float32)
    wide = torch.full((2, 8, 64), float("nan"))
    wide[:, :4] = case.q
    expected = case.expected()
    case.q = wide[:, :4]
    _assert_close(case.run(), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda case: setattr(case, "q", case.q[:, :, :32]), "q_THD"),
        (lambda case: setattr(case, "k", case.k.transpose(1, 2)), "k_cache"),
        (lambda case: setattr(case, "v", case.v.half()), "v_cache"),
        (lambda case: setattr(case, "tables", case.tables.long()), "block_tables"),
    ],
)
def test_what_does_not_fit_is_named(change, named):
    case = Case([70, 33], [1, 1], 4, 2, 64, 16, torch.float32)
    work = case.work()
    change(case)
    with pytest.raises(ConfigError, match=named):
        case.run(work=work)
