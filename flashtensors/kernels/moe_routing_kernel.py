"""Triton body of `moe_routing.py`: scores, groups and the k best of a row in one pass, in registers.

Choices are compared as 64-bit integers: their fp32 bits in an order that integers share, above the expert's distance
from the last, so that one maximum finds the best expert and, of equals, the lower id.

Shapes: T rows, X experts, k experts of a row.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ConfigError
from .moe_routing import Routing

MAX_EXPERTS = 512
"""Experts whose scores a warp holds in registers."""

_NOT_A_CHOICE = tl.constexpr(-(2**63))


@triton.jit
def _keys(choice, columns, NUM_COLUMNS: tl.constexpr):
    """Integers in the order of `choice`, then of falling column; what is not a number comes last."""
    choice = tl.where(choice == choice, choice, float("-inf")) + 0.0
    bits = choice.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return ordered * NUM_COLUMNS + (NUM_COLUMNS - 1 - columns)[None, :]


@triton.jit
def _column_of(key, NUM_COLUMNS: tl.constexpr):
    return (NUM_COLUMNS - 1 - (key & (NUM_COLUMNS - 1))).to(tl.int32)


@triton.jit
def _is_in_kept_group(
    choice,
    columns,
    NUM_EXPERTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_GROUPS_KEPT: tl.constexpr,
    SCORE_EXPERTS: tl.constexpr,
):
    """For each row and expert, whether its group is one of the best."""
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group_of = columns // GROUP_SIZE
    keys = _keys(choice, columns, NUM_COLUMNS)
    group_scores = tl.zeros_like(choice)
    for group in range(NUM_GROUPS):
        in_group = (group_of == group)[None, :]
        group_keys = tl.where(in_group, keys, _NOT_A_CHOICE)
        total = tl.zeros_like(tl.max(choice, axis=1))
        for _ in tl.static_range(SCORE_EXPERTS):
            best = _column_of(tl.max(group_keys, axis=1), NUM_COLUMNS)
            is_best = columns[None, :] == best[:, None]
            total += tl.sum(tl.where(is_best, choice, 0.0), axis=1)
            group_keys = tl.where(is_best, _NOT_A_CHOICE, group_keys)
        group_scores = tl.where(in_group, total[:, None], group_scores)
    group_keys = tl.where((columns < NUM_EXPERTS)[None, :], _keys(group_scores, columns, NUM_COLUMNS), _NOT_A_CHOICE)
    is_kept = group_keys < _NOT_A_CHOICE
    for _ in tl.static_range(NUM_GROUPS_KEPT):
        best = _column_of(tl.max(group_keys, axis=1), NUM_COLUMNS)
        is_best = group_of[None, :] == (best // GROUP_SIZE)[:, None]
        is_kept = is_kept | is_best
        group_keys = tl.where(is_best, _NOT_A_CHOICE, group_keys)
    return is_kept


@triton.jit(do_not_specialize=["num_rows"])
def _route(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_rows,
    row_stride,
    scale,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALISE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_GROUPS_KEPT: tl.constexpr,
    SCORE_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, NUM_COLUMNS)
    is_row, is_expert = rows < num_rows, (columns < NUM_EXPERTS)[None, :]
    at = logits_ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    logits = tl.load(at, mask=is_row[:, None] & is_expert, other=0.0).to(tl.float32)
    if IS_SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        logits = tl.where(is_expert, logits, float("-inf"))
        exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = exponentials / tl.sum(exponentials, axis=1)[:, None]
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + columns, mask=columns < NUM_EXPERTS, other=0.0)[None, :]
    choice = tl.where(choice == choice, choice, float("-inf"))
    is_eligible = is_expert & (rows >= 0)[:, None]
    if NUM_GROUPS > 1:
        is_eligible = is_eligible & _is_in_kept_group(
            choice, columns, NUM_EXPERTS, NUM_COLUMNS, NUM_GROUPS, NUM_GROUPS_KEPT, SCORE_EXPERTS
        )
    keys = tl.where(is_eligible, _keys(choice, columns, NUM_COLUMNS), _NOT_A_CHOICE)
    places = tl.arange(0, TOP_K_PADDED)
    ids = tl.zeros([BLOCK_ROWS, TOP_K_PADDED], tl.int32)
    weights = tl.zeros([BLOCK_ROWS, TOP_K_PADDED], tl.float32)
    for place in range(TOP_K):
        best = _column_of(tl.max(keys, axis=1), NUM_COLUMNS)
        is_best = columns[None, :] == best[:, None]
        keys = tl.where(is_best, _NOT_A_CHOICE, keys)
        weight = tl.sum(tl.where(is_best, scores, 0.0), axis=1)
        is_place = (places == place)[None, :]
        ids = tl.where(is_place, best[:, None], ids)
        weights = tl.where(is_place, weight[:, None], weights)
    if RENORMALISE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    out = rows.to(tl.int64)[:, None] * TOP_K + places[None, :]
    is_out = is_row[:, None] & (places < TOP_K)[None, :]
    tl.store(ids_ptr + out, ids, mask=is_out)
    tl.store(weights_ptr + out, weights * scale, mask=is_out)


def launch_route(
    logits_TX: Tensor, routing: Routing, bias_X: Tensor | None = None, *, block_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `route`; `routing` has been checked.

    Args:
        logits_TX: See `route`; at most `MAX_EXPERTS` experts.
        routing: See `route`.
        bias_X: See `route`.
        block_rows: Rows of a program, a power of two; None: by the number of experts.
    """
    num_rows, num_experts = logits_TX.shape
    if num_experts > MAX_EXPERTS:
        raise ConfigError(f"logits are of {num_experts} experts, but routing on a GPU takes at most {MAX_EXPERTS}")
    top_k = routing.num_experts_per_token
    if logits_TX.stride(1) != 1:
        logits_TX = logits_TX.contiguous()
    ids_Tk = torch.empty(num_rows, top_k, dtype=torch.int32, device=logits_TX.device)
    weights_Tk = torch.empty(num_rows, top_k, dtype=torch.float32, device=logits_TX.device)
    if num_rows == 0:
        return ids_Tk, weights_Tk
    num_columns = triton.next_power_of_2(num_experts)
    block_rows = block_rows or (4 if num_columns >= 64 else 16)
    _route[(triton.cdiv(num_rows, block_rows),)](
        logits_TX,
        bias_X,
        ids_Tk,
        weights_Tk,
        num_rows,
        logits_TX.stride(0),
        float(routing.scale),
        TOP_K=top_k,
        TOP_K_PADDED=triton.next_power_of_2(top_k),
        NUM_EXPERTS=num_experts,
        NUM_COLUMNS=num_columns,
        IS_SIGMOID=routing.is_sigmoid,
        HAS_BIAS=bias_X is not None,
        RENORMALISE=routing.renormalise,
        NUM_GROUPS=routing.num_groups,
        NUM_GROUPS_KEPT=routing.num_groups_kept,
        SCORE_EXPERTS=routing.experts_per_group_score,
        BLOCK_ROWS=block_rows,
        num_warps=4,
    )
    return ids_Tk, weights_Tk
