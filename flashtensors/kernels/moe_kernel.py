"""Launches of a mixture of experts on a GPU: which kernels, and with which tiles, for how many rows.

At most 16 rows (`moe_decode_kernel.py`): two products and a sum. More (`moe_sort_kernel.py`, `moe_gemm_kernel.py`): two
launches that sort, two products and a sum. Nothing waits for the device and no size depends on what is on it, so a CUDA
graph can hold a launch. Tiles follow from the mean number of rows of an expert; they are what was quickest on one H200.

Shapes: T rows, E hidden size, M intermediate size, X experts, k experts of a row, P = T k, N = 2 M.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from .device_traits import shared_memory_bytes
from .moe_decode_kernel import DECODE_ROWS, _multiply_few
from .moe_gemm_kernel import _combine, _multiply
from .moe_sort_kernel import launch_sort

_COMBINE_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Shape of a program's work in one of the two products; sizes are powers of two."""

    block_n: int
    """Columns of the result; of gate and of up, each as many."""
    block_k: int
    """Columns of both factors in one step, in elements of 2 bytes."""
    num_warps: int
    num_stages: int
    group_tiles: int = 8
    """Tiles that go through columns together."""


@dataclass(frozen=True, kw_only=True)
class MoeTiles:
    """Shape of the work of both products."""

    block_m: int
    """Pairs of a tile."""
    has_halves: bool = False
    """A tile with at most half its pairs is computed with half its lines."""
    gate_up: Tiles
    down: Tiles


DECODE_TILES = MoeTiles(
    block_m=DECODE_ROWS,
    gate_up=Tiles(block_n=32, block_k=128, num_warps=2, num_stages=4),
    down=Tiles(block_n=64, block_k=256, num_warps=4, num_stages=3),
)
"""For at most 16 rows."""

TILES_BY_ROWS: tuple[tuple[float, MoeTiles], ...] = (
    (
        8,
        MoeTiles(
            block_m=16,
            gate_up=Tiles(block_n=32, block_k=128, num_warps=4, num_stages=4),
            down=Tiles(block_n=128, block_k=128, num_warps=4, num_stages=3),
        ),
    ),
    (
        24,
        MoeTiles(
            block_m=32,
            gate_up=Tiles(block_n=64, block_k=128, num_warps=4, num_stages=3),
            down=Tiles(block_n=128, block_k=128, num_warps=4, num_stages=3),
        ),
    ),
    (
        56,
        MoeTiles(
            block_m=64,
            gate_up=Tiles(block_n=64, block_k=64, num_warps=4, num_stages=3),
            down=Tiles(block_n=128, block_k=64, num_warps=4, num_stages=3),
        ),
    ),
    (
        512,
        MoeTiles(
            block_m=128,
            has_halves=True,
            gate_up=Tiles(block_n=128, block_k=64, num_warps=8, num_stages=4),
            down=Tiles(block_n=256, block_k=64, num_warps=8, num_stages=4),
        ),
    ),
    (
        float("inf"),
        MoeTiles(
            block_m=128,
            has_halves=True,
            gate_up=Tiles(block_n=128, block_k=64, num_warps=8, num_stages=4, group_tiles=32),
            down=Tiles(block_n=256, block_k=64, num_warps=8, num_stages=4),
        ),
    ),
)
"""For more: up to how many pairs of an expert in the mean, and the tiles then."""


def choose_tiles(num_pairs: int, num_experts: int) -> MoeTiles:
    """Tiles for more than 16 rows, by the mean number of pairs of an expert."""
    mean_rows = num_pairs / num_experts
    return next(tiles for limit, tiles in TILES_BY_ROWS if mean_rows <= limit)


def launch_moe(
    x_TE: Tensor,
    gate_up_XNE: Tensor,
    down_XEM: Tensor,
    expert_ids_Tk: Tensor,
    weights_Tk: Tensor,
    *,
    out: Tensor | None = None,
    tiles: MoeTiles | None = None,
    is_decode: bool | None = None,
) -> Tensor:
    """As `moe`, whose checks have been made.

    Args:
        x_TE: And the other tensors: see `moe`.
        gate_up_XNE: See `moe`.
        down_XEM: See `moe`.
        expert_ids_Tk: See `moe`.
        weights_Tk: See `moe`.
        out: See `moe`.
        tiles: None: by the number of rows.
        is_decode: Whether to take the kernels for at most 16 rows; None: where there are no more.
    """
    out = torch.empty_like(x_TE, memory_format=torch.contiguous_format) if out is None else out
    num_rows, top_k = expert_ids_Tk.shape
    if num_rows == 0:
        return out
    operands = (x_TE, gate_up_XNE, down_XEM, expert_ids_Tk, weights_Tk)
    if num_rows <= DECODE_ROWS if is_decode is None else is_decode:
        updates_PE = _launch_decode(*operands, tiles or DECODE_TILES)
    else:
        updates_PE = _launch_grouped(*operands, tiles or choose_tiles(expert_ids_Tk.numel(), gate_up_XNE.shape[0]))
    hidden = x_TE.shape[1]
    block = min(_COMBINE_BLOCK, triton.next_power_of_2(hidden))
    _combine[(num_rows, triton.cdiv(hidden, block))](
        updates_PE, out, TOP_K=top_k, HIDDEN=hidden, BLOCK=block, num_warps=4
    )
    return out


def _launch_decode(
    x_TE: Tensor, gate_up_XNE: Tensor, down_XEM: Tensor, expert_ids_Tk: Tensor, weights_Tk: Tensor, tiles: MoeTiles
) -> Tensor:
    num_rows, top_k = expert_ids_Tk.shape
    _, hidden, inner = down_XEM.shape
    hidden_PM = x_TE.new_empty(num_rows * top_k, inner)
    updates_PE = x_TE.new_empty(num_rows * top_k, hidden, dtype=torch.float32)
    constants = {
        "TOP_K": top_k,
        "TOP_K_PADDED": triton.next_power_of_2(top_k),
        "HIDDEN": hidden,
        "INNER": inner,
        "ROWS": DECODE_ROWS,
        "PRECISION": "ieee",
    }
    products = ((tiles.gate_up, x_TE, gate_up_XNE, hidden_PM), (tiles.down, hidden_PM, down_XEM, updates_PE))
    for wanted, source, weights, target in products:
        chosen = _fitted(wanted, DECODE_ROWS, source, weights, target)
        _multiply_few[(num_rows * top_k, triton.cdiv(target.shape[1], chosen.block_n))](
            source, weights, target, weights_Tk, expert_ids_Tk, num_rows, source.stride(0), IS_DOWN=weights is down_XEM,
            **constants, **_launch_options(chosen),
        )  # fmt: skip
    return updates_PE


def _launch_grouped(
    x_TE: Tensor, gate_up_XNE: Tensor, down_XEM: Tensor, expert_ids_Tk: Tensor, weights_Tk: Tensor, tiles: MoeTiles
) -> Tensor:
    num_pairs, top_k = expert_ids_Tk.numel(), expert_ids_Tk.shape[1]
    num_experts, hidden, inner = down_XEM.shape
    hidden_PM = x_TE.new_empty(num_pairs, inner)
    updates_PE = x_TE.new_empty(num_pairs, hidden)
    pairs = launch_sort(expert_ids_Tk, num_experts, block_m=tiles.block_m)
    places = (pairs.pairs_P, pairs.starts_X, pairs.ends_X, pairs.tile_ends_X, pairs.max_tiles)
    constants = {
        "TOP_K": top_k,
        "NUM_EXPERTS": num_experts,
        "NUM_COLUMNS": triton.next_power_of_2(num_experts),
        "HIDDEN": hidden,
        "INNER": inner,
        "BLOCK_M": tiles.block_m,
        "HAS_HALVES": tiles.has_halves,
        "PRECISION": "ieee",
    }
    products = ((tiles.gate_up, x_TE, gate_up_XNE, hidden_PM), (tiles.down, hidden_PM, down_XEM, updates_PE))
    for wanted, source, weights, target in products:
        chosen = _fitted(wanted, tiles.block_m, source, weights, target)
        _multiply[(pairs.max_tiles * triton.cdiv(target.shape[1], chosen.block_n),)](
            source, weights, target, weights_Tk, *places, source.stride(0), IS_DOWN=weights is down_XEM,
            GROUP_TILES=chosen.group_tiles, **constants, **_launch_options(chosen),
        )  # fmt: skip
    return updates_PE


def _fitted(tiles: Tiles, block_m: int, source: Tensor, weights: Tensor, target: Tensor) -> Tiles:
    """`tiles` no larger than the product, with as many bytes in a step for 4-byte elements as for 2.

    All steps under way but the one that arrives lie in shared memory: where a program has less, there are fewer.
    """
    num_columns, depth = target.shape[1], source.shape[1]
    block_n = min(tiles.block_n, max(16, triton.next_power_of_2(num_columns)))
    block_k = max(16, tiles.block_k * 2 // source.dtype.itemsize)
    block_k = min(block_k, max(16, triton.next_power_of_2(depth)))
    num_matrices = weights.shape[1] // num_columns  # gate and up, or down
    step_bytes = (block_m + num_matrices * block_n) * block_k * source.dtype.itemsize
    num_stages = min(tiles.num_stages, 1 + shared_memory_bytes(source.device) // step_bytes)
    return replace(tiles, block_n=block_n, block_k=block_k, num_stages=num_stages)


def _launch_options(tiles: Tiles) -> dict[str, int]:
    return {
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
