"""Triton bodies of the norms in `norm.py`, with the same roundings.

A tile is a few whole rows, so a row is read once: it is summed and scaled in registers. By default a program does one
tile; a persistent one walks over tiles, asks for the next before it reduces the one in hand, and keeps the weights.

Shapes: T rows (any leading dimensions), E elements that are normalised.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from .device_traits import has_early_start, num_multiprocessors

MAX_ROW_ELEMENTS = 65536
"""Elements of the longest row: what the registers of one block hold."""

_TILE_ELEMENTS = 2048
"""Short rows share a tile of this many elements: 16 for each thread of four warps."""


@triton.jit
def scale_rows(x, weight, eps, NUM_COLUMNS: tl.constexpr, IS_GEMMA: tl.constexpr, DTYPE: tl.constexpr):
    """Norm of fp32 rows `x [R, E]`, rounded to `DTYPE` where transformers rounds; `weight [1, E]` is fp32."""
    mean_square = tl.sum(x * x, axis=1) / NUM_COLUMNS
    normalised = x * tl.rsqrt(mean_square + eps)[:, None]
    if IS_GEMMA:
        return (normalised * (1.0 + weight)).to(DTYPE)
    return (normalised.to(DTYPE).to(tl.float32) * weight).to(DTYPE)


@triton.jit
def _load_tile(
    x_ptr,
    residual_ptr,
    tile,
    num_rows,
    rows_per_group,
    x_group_stride,
    x_row_stride,
    residual_row_stride,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Rows of a tile of `x` and of the residual, in their dtype; rows past the end are not read."""
    row = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    is_live = (row < num_rows) & (columns < NUM_COLUMNS)
    group, member = (row // rows_per_group).to(tl.int64), (row % rows_per_group).to(tl.int64)
    x_at = x_ptr + group * x_group_stride + member * x_row_stride + columns
    x = tl.load(x_at, mask=is_live, other=0.0)
    residual = x
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row.to(tl.int64) * residual_row_stride + columns, mask=is_live, other=0.0)
    return x, residual


@triton.jit(do_not_specialize=["num_rows"])  # it changes with every batch
def _norm_rows(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    rows_per_group,
    x_group_stride,
    x_row_stride,
    residual_row_stride,
    eps,
    NUM_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GEMMA: tl.constexpr,
    IS_PERSISTENT: tl.constexpr,
    HAS_EARLY_START: tl.constexpr,
):
    """Norm of `x`, or of `residual += x`; row r of `x` is member `r % rows_per_group` of its group."""
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    is_column = columns < NUM_COLUMNS
    first, step = tl.program_id(0), tl.num_programs(0)
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if HAS_EARLY_START:  # the kernel behind may be placed now; this one may run before the one in front has ended
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # fmt: off
    x_next, residual_next = _load_tile(
        x_ptr, residual_ptr, first, num_rows, rows_per_group, x_group_stride, x_row_stride, residual_row_stride,
        NUM_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, HAS_RESIDUAL,
    )
    for tile in tl.range(first, tl.cdiv(num_rows, BLOCK_ROWS), step):
        x, residual = x_next, residual_next
        if IS_PERSISTENT:
            x_next, residual_next = _load_tile(
                x_ptr, residual_ptr, tile + step, num_rows, rows_per_group, x_group_stride, x_row_stride,
                residual_row_stride, NUM_COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS, HAS_RESIDUAL,
            )
        # fmt: on
        row = tl.full([], 0, tl.int64) + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        is_live = (row < num_rows) & is_column
        if HAS_RESIDUAL:
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            tl.store(residual_ptr + row * residual_row_stride + columns, x, mask=is_live)
        out = scale_rows(x.to(tl.float32), weight, eps, NUM_COLUMNS, IS_GEMMA, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * NUM_COLUMNS + columns, out, mask=is_live)


def launch_rms_norm(
    x_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    is_gemma: bool = False,
    out: Tensor | None = None,
    num_warps: int | None = None,
    programs_per_multiprocessor: int | None = None,
) -> Tensor:
    """Norm of the last dimension of `x_TE`, into `out` or a new contiguous tensor; the door has checked the weight.

    Args:
        x_TE: Rows; those of a 3-D view (heads inside a fused projection) are read in place.
        weight_E: Contiguous.
        eps: Added to the mean square.
        is_gemma: Scale by `1 + weight`, rounded once.
        out: Contiguous, shaped and typed as `x_TE`; may be `x_TE` itself.
        num_warps: Warps of a program; None: by the size of its tile.
        programs_per_multiprocessor: Programs that share all tiles; None: one program for each tile.
    """
    out = _checked_out(x_TE, out)
    if x_TE.stride(-1) != 1 or (x_TE.dim() > 3 and not x_TE.is_contiguous()):
        x_TE = x_TE.contiguous()
    if x_TE.dim() != 3:
        x_TE = x_TE.reshape(-1, 1, x_TE.shape[-1])
    _launch(x_TE, None, weight_E, eps, out, is_gemma, num_warps, programs_per_multiprocessor)
    return out


def launch_add_rms_norm(
    update_TE: Tensor,
    residual_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    is_gemma: bool = False,
    out: Tensor | None = None,
    num_warps: int | None = None,
    programs_per_multiprocessor: int | None = None,
) -> Tensor:
    """Add `update_TE` to `residual_TE` in place and return the norm of the sum, in one pass over the bytes.

    The door has checked weight and residual.

    Args:
        update_TE: Any leading dimensions and strides.
        residual_TE: Shaped and typed as `update_TE`, rows at even distances, last stride 1; mutated.
        weight_E: As for `launch_rms_norm`, and so are the rest.
        eps: Added to the mean square.
        is_gemma: Scale by `1 + weight`, rounded once.
        out: Contiguous; may be `update_TE` itself.
        num_warps: As for `launch_rms_norm`.
        programs_per_multiprocessor: As for `launch_rms_norm`.
    """
    out = _checked_out(update_TE, out)
    if update_TE.stride(-1) != 1 or (update_TE.dim() != 2 and not update_TE.is_contiguous()):
        update_TE = update_TE.contiguous()
    num_columns = update_TE.shape[-1]
    update, residual = update_TE.view(-1, 1, num_columns), residual_TE.view(-1, num_columns)
    _launch(update, residual, weight_E, eps, out, is_gemma, num_warps, programs_per_multiprocessor)
    return out


def _checked_out(x: Tensor, out: Tensor | None) -> Tensor:
    if x.shape[-1] > MAX_ROW_ELEMENTS:
        raise ConfigError(f"rows of {x.shape[-1]} elements are too long; at most {MAX_ROW_ELEMENTS} are normalised")
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ConfigError(
            f"out is {out.dtype} {list(out.shape)} with strides {out.stride()}, but it must be contiguous "
            f"{x.dtype} {list(x.shape)}, as the input"
        )
    return out


def _launch(
    x_GRE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    out: Tensor,
    is_gemma: bool,
    num_warps: int | None,
    programs_per_multiprocessor: int | None,
) -> None:
    """Run over the rows R of groups G; row r of group g is row `g * R + r` of the residual and of `out`."""
    num_rows, num_columns = x_GRE.shape[0] * x_GRE.shape[1], x_GRE.shape[2]
    if num_rows * num_columns == 0:
        return
    block_columns = triton.next_power_of_2(num_columns)
    block_rows = max(1, _TILE_ELEMENTS // block_columns)
    grid = triton.cdiv(num_rows, block_rows)
    if programs_per_multiprocessor is not None:
        grid = min(grid, programs_per_multiprocessor * num_multiprocessors(x_GRE.device))
    _norm_rows[(grid,)](
        x_GRE,
        x_GRE if residual_TE is None else residual_TE,
        weight_E,
        out,
        num_rows,
        x_GRE.shape[1],
        x_GRE.stride(0),
        x_GRE.stride(1),
        0 if residual_TE is None else residual_TE.stride(0),
        eps,
        NUM_COLUMNS=num_columns,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        HAS_RESIDUAL=residual_TE is not None,
        IS_GEMMA=is_gemma,
        IS_PERSISTENT=programs_per_multiprocessor is not None,
        HAS_EARLY_START=has_early_start(x_GRE.device),
        num_warps=num_warps or _num_warps(block_rows * block_columns),
        launch_pdl=has_early_start(x_GRE.device),
    )


def _num_warps(num_elements: int) -> int:
    """By the elements of a tile: 16 for each thread; for 4096 of them 8 (67.6 against 70.9 µs for 8192 x 4096)."""
    return max(1, min(num_elements // (256 if num_elements >= 4096 else 512), 16))
