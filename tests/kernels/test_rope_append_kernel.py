"""Rope and append, as torch does it and as Triton does it, against fp64 written out row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtensors.kernels.rope_append as rope_append_door
from flashtensors.errors import ConfigError
from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.kernels.rope import Rotation, inverse_frequencies, rotation, yarn_frequencies
from flashtensors.kernels.rope_append import KvScales, QkNorm, rope_append, rope_append_reference

from .tolerances import DEVICE, DTYPES, assert_near

EPS = 1e-6
NUM_PAGES, PAGE_SIZE = 5, 4
CASES = [(4, 2, 64, 64), (3, 1, 80, 32), (9, 3, 64, 64), (2, 2, 96, 48), (1, 1, 16, 2)]
"""Query heads, kv heads, head dim, rotary dim."""

Append = Callable[..., Tensor]


def triton_append(qkv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    pytest.importorskip("triton")
    from flashtensors.kernels.rope_append_kernel import launch_rope_append

    rope, k_cache, v_cache, slots = args
    out = kwargs.get("out")
    if out is None:
        out = torch.full((qkv.shape[0], kwargs["num_heads"], k_cache.shape[3]), torch.nan).to(qkv)
    optional = [kwargs.get(name) for name in ("positions_T", "norm", "scales")]
    launch_rope_append(qkv, rope, k_cache, v_cache, slots, out, *optional)
    return out


IMPLEMENTATIONS = [pytest.param(triton_append, id="triton"), pytest.param(rope_append, id="door")]


def make(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 2).to(device=DEVICE, dtype=dtype)


def make_inputs(case: tuple[int, int, int, int], slots: list[int], dtype: torch.dtype) -> dict[str, Any]:
    num_heads, num_kv_heads, head_dim, rotary_dim = case
    fused = make(len(slots), (num_heads + 2 * num_kv_heads) * head_dim + 24, dtype=dtype)
    positions = torch.arange(len(slots)) * 37 + 5
    caches = torch.full((2, NUM_PAGES, num_kv_heads, PAGE_SIZE, head_dim), torch.nan).to(device=DEVICE, dtype=dtype)
    rope = rotation(positions, inverse_frequencies(rotary_dim, 10000.0), dtype)
    return {
        "qkv": fused[:, :-24],
        "rotation": Rotation(cos_T1D=rope.cos_T1D.to(DEVICE), sin_T1D=rope.sin_T1D.to(DEVICE)),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "slot_mapping_T": torch.tensor(slots, dtype=torch.int64, device=DEVICE),
        "num_heads": num_heads,
    }


def run(append: Append, inputs: dict[str, Any], **options: Any) -> Tensor:
    given = dict(inputs, **options)
    positional = [given.pop(name) for name in ("qkv", "rotation", "k_cache", "v_cache", "slot_mapping_T")]
    return append(*positional, **given)


def exact(inputs: dict[str, Any], norm: QkNorm | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in fp64, by the formulas alone."""
    head_dim, num_kv_heads = inputs["k_cache"].shape[3], inputs["k_cache"].shape[1]
    heads = inputs["qkv"].double().unflatten(-1, (-1, head_dim))
    q, k, v = heads.split((inputs["num_heads"], num_kv_heads, num_kv_heads), dim=1)
    if norm is not None:
        q, k = (
            x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * (weight.double() + norm.is_gemma)
            for x, weight in ((q, norm.q_weight_D), (k, norm.k_weight_D))
        )
    half = inputs["rotation"].cos_T1D.shape[-1] // 2
    cos, sin = inputs["rotation"].cos_T1D[..., :half].double(), inputs["rotation"].sin_T1D[..., half:].double()

    def turn(x: Tensor) -> Tensor:
        first, second = x[..., :half], x[..., half : 2 * half]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]), -1)

    return turn(q), turn(k), v


def cache_rows(cache: Tensor, slots: list[int]) -> Tensor:
    return torch.stack([cache[slot // PAGE_SIZE, :, slot % PAGE_SIZE] for slot in slots])


@pytest.mark.parametrize("append", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_queries_turn_and_keys_and_values_reach_their_slots(
    case: tuple[int, int, int, int], dtype: torch.dtype, append: Append
) -> None:
    slots = [17, 2, 3, 4, 0, 19]
    inputs = make_inputs(case, slots, dtype)
    q, k, v = exact(inputs)
    assert_near(run(append, inputs), q, "rotation")
    assert_near(cache_rows(inputs["k_cache"], slots), k, "rotation")
    assert torch.equal(cache_rows(inputs["v_cache"], slots).double(), v)
    others = [slot for slot in range(NUM_PAGES * PAGE_SIZE) if slot not in slots]
    assert cache_rows(inputs["k_cache"], others).isnan().all()
    assert cache_rows(inputs["v_cache"], others).isnan().all()


@pytest.mark.parametrize("append", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_gemma", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[:2])
def test_heads_are_normalised_before_they_turn(
    case: tuple[int, int, int, int], dtype: torch.dtype, is_gemma: bool, append: Append
) -> None:
    inputs = make_inputs(case, [5, 9, 1], dtype)
    weights = make(2, case[2], dtype=dtype)
    norm = QkNorm(q_weight_D=weights[0], k_weight_D=weights[1], eps=EPS, is_gemma=is_gemma)
    q, k, _ = exact(inputs, norm)
    out = run(append, inputs, norm=norm)
    assert_near(out / 4, q / 4, "rotation")  # weights and heads of size 2 meet: errors are of that size
    assert_near(cache_rows(inputs["k_cache"], [5, 9, 1]) / 4, k / 4, "rotation")


@pytest.mark.parametrize("append", IMPLEMENTATIONS)
def test_padding_rows_write_nothing(append: Append) -> None:
    inputs = make_inputs(CASES[0], [-1, 6, -1], torch.float32)
    inputs["qkv"][0] = inputs["qkv"][2] = torch.nan
    expected_q, expected_k, _ = exact(inputs)
    out = run(append, inputs, out=torch.full((3, 4, 64), 7.0, device=DEVICE))
    assert_near(out[1], expected_q[1], "rotation")
    assert (out[[0, 2]] == 7.0).all()
    assert_near(cache_rows(inputs["k_cache"], [6])[0], expected_k[1], "rotation")
    assert inputs["k_cache"].isnan().sum() == inputs["k_cache"].numel() - expected_k[1].numel()


@pytest.mark.parametrize("append", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[:2])
def test_angles_are_looked_up_by_position_and_may_be_stretched(
    case: tuple[int, int, int, int], dtype: torch.dtype, append: Append
) -> None:
    inputs = make_inputs(case, [3, 8, 11], dtype)
    frequencies = yarn_frequencies(case[3], 10000.0, factor=4.0, original_max_position=32)
    table = rotation(torch.arange(50), frequencies, dtype, attention_factor=1.139)
    table = Rotation(cos_T1D=table.cos_T1D.to(DEVICE), sin_T1D=table.sin_T1D.to(DEVICE))
    positions = torch.tensor([49, 0, 7], device=DEVICE)
    rows = replace(inputs["rotation"], cos_T1D=table.cos_T1D[positions], sin_T1D=table.sin_T1D[positions])
    q, k, _ = exact(dict(inputs, rotation=rows))
    assert_near(run(append, inputs, rotation=table, positions_T=positions), q, "rotation")
    assert_near(cache_rows(inputs["k_cache"], [3, 8, 11]), k, "rotation")


@pytest.mark.parametrize("append", IMPLEMENTATIONS)
def test_queries_may_stay_in_place(append: Append) -> None:
    inputs = make_inputs(CASES[1], [3, 8, 11], torch.float32)
    expected_q, _, expected_v = exact(inputs)
    in_place = inputs["qkv"].unflatten(-1, (-1, 80))[:, :3]
    assert run(append, inputs, out=in_place) is in_place
    assert_near(inputs["qkv"].unflatten(-1, (-1, 80))[:, :3], expected_q, "rotation")
    assert torch.equal(cache_rows(inputs["v_cache"], [3, 8, 11]).double(), expected_v)


def quantised_inputs(slots: list[int], dtype: torch.dtype) -> tuple[dict[str, Any], KvScales]:
    inputs = make_inputs((2, 2, 64, 32), slots, dtype)
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.zeros(inputs[name].shape, device=DEVICE).to(FP8_DTYPE)
    k_scale_K, v_scale_K = torch.tensor([[0.5, 2.0], [1.0, 0.25]], device=DEVICE)
    return inputs, KvScales(k_scale_K=k_scale_K, v_scale_K=v_scale_K)


@pytest.mark.parametrize("append", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_numbers_are_stored_as_they_are_and_large_ones_saturate(dtype: torch.dtype, append: Append) -> None:
    slots, rows = [17, 2, -1, 4], [0, 1, 3]
    inputs, scales = quantised_inputs(slots, dtype)
    still = torch.zeros(4, 1, 32).to(inputs["qkv"])
    inputs["rotation"] = Rotation(cos_T1D=still + 1, sin_T1D=still)
    wanted = (torch.randn(4, 6, 64, device=DEVICE) * 50).to(FP8_DTYPE).to(dtype)
    both_scales = torch.stack((scales.k_scale_K, scales.v_scale_K)).to(dtype)
    heads = inputs["qkv"].unflatten(-1, (6, 64))
    heads[:, 2:] = wanted[:, 2:] * both_scales.flatten()[:, None]
    heads[0, 2:, 0], heads[1, 2:, 1] = 60000.0, -60000.0
    wanted[0, 2:, 0], wanted[1, 2:, 1] = 448.0, -448.0
    run(append, inputs, scales=scales)
    for cache, begin in (("k_cache", 2), ("v_cache", 4)):
        stored = cache_rows(inputs[cache].float(), [17, 2, 4])
        assert torch.equal(stored, wanted[rows, begin : begin + 2].float())


@pytest.mark.parametrize(
    "append",
    [
        pytest.param(rope_append, id="door"),
        # the interpreter loses the carry of a mantissa that rounds up: 1.998 becomes 1
        pytest.param(triton_append, id="triton", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_cache_holds_the_nearest_fp8(dtype: torch.dtype, append: Append) -> None:
    slots, rows = [17, 2, -1, 4], [0, 1, 3]
    inputs, scales = quantised_inputs(slots, dtype)
    _, k, v = exact(inputs)
    run(append, inputs, scales=scales)
    for cache, x, scale in (("k_cache", k, scales.k_scale_K), ("v_cache", v, scales.v_scale_K)):
        stored = cache_rows(inputs[cache].float(), [17, 2, 4]).double()
        wanted = x[rows] / scale.double()[:, None]
        half_step = 2**-4 * wanted.abs() * 1.04  # 3 mantissa bits, and bf16 before them
        assert ((stored - wanted).abs() <= half_step.clamp_min(2**-10)).all()


def test_no_rows_are_no_work() -> None:
    inputs = make_inputs(CASES[0], [], torch.float32)
    assert run(rope_append, inputs).shape == (0, 4, 64)
    assert run(triton_append, inputs).shape == (0, 4, 64)


@pytest.mark.skipif(DEVICE != "cpu", reason="says what a CPU does")
def test_the_reference_is_what_runs_on_a_cpu() -> None:
    inputs = make_inputs(CASES[0], [1, 2], torch.float32)
    assert torch.equal(run(rope_append, inputs), run(rope_append_reference, inputs))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qkv", torch.zeros(3, 500)),
        ("v_cache", torch.zeros(5, 2, 4, 64, dtype=torch.float16)),
        ("slot_mapping_T", torch.zeros(3, dtype=torch.int32)),
        ("positions_T", torch.zeros(2, dtype=torch.int64)),
        ("out", torch.zeros(3, 4, 32)),
        ("rotation", Rotation(cos_T1D=torch.zeros(2, 1, 64), sin_T1D=torch.zeros(2, 1, 64))),
        ("rotation", Rotation(cos_T1D=torch.zeros(3, 1, 66), sin_T1D=torch.zeros(3, 1, 66))),
        ("k_cache", torch.zeros(5, 2, 4, 64).to(FP8_DTYPE)),
        ("k_cache", torch.zeros(5, 4, 64)),
        ("k_cache", torch.zeros(5, 2, 64, 4).mT),
        ("v_cache", torch.zeros(5, 4, 64)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name: str, value: Any) -> None:
    inputs = make_inputs(CASES[0], [1, 2, 3], torch.float32)
    value = value.to(DEVICE) if isinstance(value, Tensor) else value
    with pytest.raises(ConfigError, match=rf"^{name}"):
        run(rope_append, inputs, **{name: value})


def test_fp8_caches_are_refused_by_a_gpu_that_does_not_convert_to_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(CASES[0], [1, 2, 3], torch.float32)
    caches = {name: inputs[name].to(FP8_DTYPE) for name in ("k_cache", "v_cache")}
    ones = torch.ones(2, device=DEVICE)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(rope_append_door, "has_fp8", lambda device: False)
    with pytest.raises(ConfigError, match=r"^k_cache .* quantise_kv .* scatter_tokens"):
        run(rope_append, inputs, **caches, scales=KvScales(k_scale_K=ones, v_scale_K=ones))
