"""Triton bodies of what changes logits before a token is chosen; they write only to logits of tokens that occur.

Penalties count occurrences in a row of int32 for each program: answers add 1, the prompt sets a high bit. Whoever
exchanges a count for 0 has it to himself, so every token is penalised once and the counts are zero again.

Shapes: S rows that sample, R rows with penalties, V vocabulary, L longest sequence, P programs, N entries of a row.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportIndexIssue=false
# (parameters of Triton bodies have no Python types, and launch options no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import check_logits, require
from .penalties import Penalties

MAX_PROGRAMS = 64
"""P: programs that penalise rows at once; each needs counts of the whole vocabulary."""

_IN_PROMPT = tl.constexpr(1 << 30)
_TILE = tl.constexpr(1024)


@triton.jit
def _penalise(
    logits_ptr,
    counts_ptr,
    rows_ptr,
    token_rows_ptr,
    token_ids_ptr,
    num_prompt_tokens_ptr,
    num_tokens_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    num_rows,
    vocab_size,
    logits_row_stride,
    token_row_stride,
    HAS_TOKEN_ROWS: tl.constexpr,
):
    """Penalise rows p, p + P, … with the counts of program p."""
    counts_row_ptr = counts_ptr + tl.program_id(0).to(tl.int64) * vocab_size
    for index in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.load(rows_ptr + index).to(tl.int64)
        token_row = tl.full([], 0, tl.int64) + index
        if HAS_TOKEN_ROWS:
            token_row = tl.load(token_rows_ptr + index).to(tl.int64)
        repetition = tl.load(repetition_ptr + index)
        presence = tl.load(presence_ptr + index)
        frequency = tl.load(frequency_ptr + index)
        num_prompt = tl.load(num_prompt_tokens_ptr + index).to(tl.int32)
        end = tl.load(num_tokens_ptr + index).to(tl.int32)
        begin = tl.where(repetition == 1.0, num_prompt, 0)  # only repetition looks at the prompt
        end = tl.where((repetition == 1.0) & (presence == 0.0) & (frequency == 0.0), begin, end)
        for start in tl.range(begin, end, _TILE):
            position = start + tl.arange(0, _TILE)
            token_at = token_ids_ptr + token_row * token_row_stride + position
            token_ids = tl.load(token_at, mask=position < end, other=0).to(tl.int32)
            is_answer = position >= num_prompt
            tl.atomic_add(counts_row_ptr + token_ids, 1, mask=(position < end) & is_answer)
            tl.atomic_or(counts_row_ptr + token_ids, _IN_PROMPT, mask=(position < end) & (is_answer == 0))
        tl.debug_barrier()
        for start in tl.range(begin, end, _TILE):
            position = start + tl.arange(0, _TILE)
            token_at = token_ids_ptr + token_row * token_row_stride + position
            token_ids = tl.load(token_at, mask=position < end, other=0).to(tl.int32)
            found = tl.atomic_xchg(counts_row_ptr + token_ids, 0, mask=position < end)
            is_first = (position < end) & (found != 0)
            count = (found & (_IN_PROMPT - 1)).to(tl.float32)
            logits_at = logits_ptr + row * logits_row_stride + token_ids
            logits = tl.load(logits_at, mask=is_first, other=0.0).to(tl.float32)
            logits = tl.where(logits > 0.0, logits / repetition, logits * repetition)
            logits -= frequency * count + presence * (count > 0.0).to(tl.float32)
            tl.store(logits_at, logits.to(logits_ptr.dtype.element_ty), mask=is_first)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["num_entries", "num_stop_ids"])  # batches differ in them
def _add_bias(
    logits_ptr,
    token_ids_ptr,
    values_ptr,
    stop_ids_ptr,
    position_ptr,
    min_length_ptr,
    vocab_size,
    row_stride,
    num_entries,
    num_stop_ids,
    ENTRIES_PAD: tl.constexpr,
    STOP_IDS_PAD: tl.constexpr,
):
    """Add one row's bias, then take its stop tokens out while it is too short; a PAD of 0: there are none."""
    row = tl.program_id(0).to(tl.int64)
    logits_row_ptr = logits_ptr + row * row_stride
    if ENTRIES_PAD > 0:
        entries = tl.arange(0, ENTRIES_PAD)
        is_entry = entries < num_entries
        token_ids = tl.load(token_ids_ptr + row * num_entries + entries, mask=is_entry, other=-1)
        is_entry = is_entry & (token_ids >= 0) & (token_ids < vocab_size)
        values = tl.load(values_ptr + row * num_entries + entries, mask=is_entry, other=0.0)
        logits = tl.load(logits_row_ptr + token_ids, mask=is_entry, other=0.0).to(tl.float32) + values
        tl.store(logits_row_ptr + token_ids, logits.to(logits_ptr.dtype.element_ty), mask=is_entry)
        tl.debug_barrier()
    if STOP_IDS_PAD > 0 and tl.load(position_ptr + row) < tl.load(min_length_ptr + row):
        stops = tl.arange(0, STOP_IDS_PAD)
        stop_ids = tl.load(stop_ids_ptr + row * num_stop_ids + stops, mask=stops < num_stop_ids, other=-1)
        is_stop = (stop_ids >= 0) & (stop_ids < vocab_size)
        masked = tl.full([STOP_IDS_PAD], float("-inf"), logits_ptr.dtype.element_ty)
        tl.store(logits_row_ptr + stop_ids, masked, mask=is_stop)


def launch_penalise(
    logits_SV: Tensor,
    penalties: Penalties,
    *,
    counts_PV: Tensor | None = None,
) -> None:
    """Penalise rows of `logits_SV` in place, rounded to its dtype; waits for nothing.

    Args:
        logits_SV: Last stride 1; mutated.
        penalties: As on a CPU.
        counts_PV: int32 zeros to count in, which are zero again afterwards; None: new ones.
    """
    check_logits(logits_SV)
    num_rows, vocab_size = len(penalties.rows_R), logits_SV.shape[1]
    device = logits_SV.device
    penalties.check(device)
    if counts_PV is None:
        counts_PV = torch.zeros((min(num_rows, MAX_PROGRAMS), vocab_size), dtype=torch.int32, device=device)
    require("counts_PV", counts_PV, torch.int32, (len(counts_PV), vocab_size), device)
    if num_rows == 0:
        return
    _penalise[(min(len(counts_PV), num_rows),)](
        logits_SV,
        counts_PV,
        penalties.rows_R,
        penalties.rows_R if penalties.token_rows_R is None else penalties.token_rows_R,
        penalties.token_ids_RL,
        penalties.num_prompt_tokens_R,
        penalties.num_tokens_R,
        penalties.repetition_R,
        penalties.presence_R,
        penalties.frequency_R,
        num_rows,
        vocab_size,
        logits_SV.stride(0),
        penalties.token_ids_RL.stride(0),
        HAS_TOKEN_ROWS=penalties.token_rows_R is not None,
        num_warps=8,
    )


def launch_add_bias(
    logits_SV: Tensor,
    *,
    token_ids_SN: Tensor | None = None,
    values_SN: Tensor | None = None,
    stop_ids_SN: Tensor | None = None,
    position_S: Tensor | None = None,
    min_length_S: Tensor | None = None,
) -> None:
    """`penalties.add_bias`, whose arguments have been checked; waits for nothing."""
    num_rows = len(logits_SV)
    num_entries = 0 if token_ids_SN is None else token_ids_SN.shape[-1]
    num_stop_ids = 0 if stop_ids_SN is None else stop_ids_SN.shape[-1]
    if num_rows == 0 or num_entries + num_stop_ids == 0:
        return
    _add_bias[(num_rows,)](
        logits_SV,
        logits_SV if token_ids_SN is None else token_ids_SN,
        logits_SV if values_SN is None else values_SN,
        logits_SV if stop_ids_SN is None else stop_ids_SN,
        logits_SV if position_S is None else position_S,
        logits_SV if min_length_S is None else min_length_S,
        logits_SV.shape[1],
        logits_SV.stride(0),
        num_entries,
        num_stop_ids,
        ENTRIES_PAD=triton.next_power_of_2(num_entries),
        STOP_IDS_PAD=triton.next_power_of_2(num_stop_ids),
        num_warps=4,
    )
