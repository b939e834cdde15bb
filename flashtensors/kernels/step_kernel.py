"""Triton bodies of `step_rows.py`: scatters and gathers of ints, bound by launches and latency alone.

Shapes: as there.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# (Triton gives parameters their types at launch, and takes options that are no parameters)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .step_rows import (
    FIRST_STOP,
    HEADER_INTS,
    MIN_LENGTH,
    MIN_P,
    NUM_FIELDS,
    SEED,
    SPAN_INTS,
    START_INTS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SlotState,
    StepRows,
)

_HEADER = tl.constexpr(HEADER_INTS)
_SPAN = tl.constexpr(SPAN_INTS)
_START = tl.constexpr(START_INTS)
_FIELDS = tl.constexpr(NUM_FIELDS)
_TEMPERATURE = tl.constexpr(TEMPERATURE)
_TOP_K = tl.constexpr(TOP_K)
_TOP_P = tl.constexpr(TOP_P)
_MIN_P = tl.constexpr(MIN_P)
_SEED = tl.constexpr(SEED)
_MIN_LENGTH = tl.constexpr(MIN_LENGTH)
_FIRST_STOP = tl.constexpr(FIRST_STOP)

_FETCH_WORDS = 512
_FETCH_PROGRAMS = 64
"""Reads of host memory take a microsecond each; so many under way keep the link busy."""

_MESSAGE_WORDS = 256
"""Of a message that one program fetches: all are under way at once, whatever of them is used."""

_PARTS = 8
"""Programs that share one sequence's tokens where prompts are computed: 8192 tokens in eight turns of each."""


@triton.jit(do_not_specialize=["num_words"])
def _fetch_words(host_ptr, device_ptr, num_words, BLOCK: tl.constexpr):
    for first in tl.range(tl.program_id(0) * BLOCK, num_words, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        words = tl.load(host_ptr + i, mask=i < num_words, volatile=True)  # the host writes it between two steps
        tl.store(device_ptr + i, words, mask=i < num_words)


@triton.jit
def _fetch_message(host_ptr, turn_ptr, message_ptr, num_messages, num_words, BLOCK: tl.constexpr):
    turn = tl.load(turn_ptr)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(host_ptr + turn.to(tl.int64) * num_words + i, mask=i < num_words)
    tl.store(message_ptr + i, words, mask=i < num_words)
    tl.debug_barrier()  # all warps have read the turn before their program counts as done, and the last one ends it
    if tl.atomic_add(turn_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(turn_ptr, (turn + 1) % num_messages)
        tl.store(turn_ptr + 1, 0)


@triton.jit
def _start_slots(starts_ptr, token_ids_ptr, slot_tokens_ptr, fields_ptr, max_length, BLOCK: tl.constexpr):
    """Programs (i, p) copy the tokens of start i; the first of them also its fields."""
    start_at = starts_ptr + tl.program_id(0) * _START
    slot = tl.load(start_at)
    num_tokens = tl.load(start_at + 1)
    begin = tl.load(start_at + 2)
    if tl.program_id(1) == 0:
        field = tl.arange(0, _FIELDS)
        tl.store(fields_ptr + slot * _FIELDS + field, tl.load(start_at + 3 + field))
    for first in tl.range(tl.program_id(1) * BLOCK, num_tokens, tl.num_programs(1) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        token_ids = tl.load(token_ids_ptr + begin + i, mask=i < num_tokens, other=0)
        tl.store(slot_tokens_ptr + slot * max_length + i, token_ids, mask=(i < num_tokens) & (i < max_length))


@triton.jit
def _append_blocks(counts_ptr, appends_ptr, tables_ptr, max_blocks, BLOCK: tl.constexpr):
    num_appends = tl.load(counts_ptr)
    for first in tl.range(tl.program_id(0) * BLOCK, num_appends, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        is_append = i < num_appends
        slot = tl.load(appends_ptr + i * 3, mask=is_append, other=0).to(tl.int64)
        index = tl.load(appends_ptr + i * 3 + 1, mask=is_append, other=0)
        unit = tl.load(appends_ptr + i * 3 + 2, mask=is_append, other=0)
        tl.store(tables_ptr + slot * max_blocks + index, unit, mask=is_append & (index < max_blocks))


@triton.jit(do_not_specialize=["num_seqs", "num_rows"])
def _expand_spans(
    message_ptr,
    slot_tokens_ptr,
    slot_tables_ptr,
    fields_ptr,
    token_ids_ptr,
    positions_ptr,
    slot_mapping_ptr,
    query_starts_ptr,
    kv_lengths_ptr,
    tables_ptr,
    last_rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    num_seqs,
    num_rows,
    max_length,
    max_blocks,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs (s, p) make the rows of sequence s; programs (S, p) the padding behind all rows."""
    s = tl.program_id(0)
    part = tl.program_id(1)
    num_spans = tl.load(message_ptr + 1)
    num_tokens = tl.load(message_ptr + 2)
    if s == num_seqs:
        if part == 0:
            tl.store(query_starts_ptr, 0)
        for begin in tl.range(num_tokens + part * BLOCK, num_rows, tl.num_programs(1) * BLOCK):
            row = begin + tl.arange(0, BLOCK)
            tl.store(token_ids_ptr + row, tl.full([BLOCK], -1, tl.int32), mask=row < num_rows)
            tl.store(positions_ptr + row, tl.zeros([BLOCK], tl.int64), mask=row < num_rows)
            tl.store(slot_mapping_ptr + row, tl.full([BLOCK], -1, tl.int64), mask=row < num_rows)
    else:
        is_span = s < num_spans
        span_at = message_ptr + _HEADER + s * _SPAN
        slot = tl.load(span_at, mask=is_span, other=0).to(tl.int64)
        start = tl.load(span_at + 1, mask=is_span, other=0)
        count = tl.load(span_at + 2, mask=is_span, other=0)
        samples = tl.load(span_at + 3, mask=is_span, other=0) != 0
        first = tl.load(span_at + 4, mask=is_span, other=0)
        first = tl.where(is_span, first, num_tokens)
        end = start + count
        if part == 0:
            tl.store(query_starts_ptr + s + 1, first + count)
            tl.store(kv_lengths_ptr + s, end)
            tl.store(last_rows_ptr + s, tl.maximum(first + count - 1, 0).to(tl.int64))
            field_at = fields_ptr + slot * _FIELDS
            temperature = tl.load(field_at + _TEMPERATURE, mask=samples, other=0).to(tl.float64, bitcast=True)
            top_p = tl.load(field_at + _TOP_P, mask=samples, other=0x3FF0000000000000).to(tl.float64, bitcast=True)
            min_p = tl.load(field_at + _MIN_P, mask=samples, other=0).to(tl.float64, bitcast=True)
            tl.store(temperature_ptr + s, temperature.to(tl.float32))
            tl.store(top_k_ptr + s, tl.load(field_at + _TOP_K, mask=samples, other=0))
            tl.store(top_p_ptr + s, top_p)
            tl.store(min_p_ptr + s, min_p.to(tl.float32))
            tl.store(seed_ptr + s, tl.load(field_at + _SEED, mask=samples, other=0))
            tl.store(position_ptr + s, end.to(tl.int64))
        table_at = slot_tables_ptr + slot * max_blocks
        for begin in tl.range(part * BLOCK, count, tl.num_programs(1) * BLOCK):
            i = begin + tl.arange(0, BLOCK)
            is_token = i < count
            position = start + i
            token_ids = tl.load(slot_tokens_ptr + slot * max_length + position, mask=is_token, other=0)
            unit = tl.load(table_at + position // PAGE, mask=is_token, other=0).to(tl.int64)
            tl.store(token_ids_ptr + first + i, token_ids, mask=is_token)
            tl.store(positions_ptr + first + i, position.to(tl.int64), mask=is_token)
            tl.store(slot_mapping_ptr + first + i, unit * PAGE + position % PAGE, mask=is_token)
        num_pages = tl.cdiv(end, PAGE)
        for begin in tl.range(part * BLOCK, num_pages, tl.num_programs(1) * BLOCK):
            i = begin + tl.arange(0, BLOCK)
            unit = tl.load(table_at + i, mask=i < num_pages, other=0)
            tl.store(tables_ptr + s.to(tl.int64) * max_blocks + i, unit, mask=i < num_pages)


@triton.jit(do_not_specialize=["num_seqs", "max_seqs"])
def _note_drawn(
    message_ptr,
    token_ids_ptr,
    is_valid_ptr,
    position_ptr,
    fields_ptr,
    slot_tokens_ptr,
    drawn_ptr,
    num_seqs,
    max_seqs,
    max_length,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_span = s < tl.load(message_ptr + 1)
    span_at = message_ptr + _HEADER + s * _SPAN
    samples = is_span & (tl.load(span_at + 3, mask=is_span, other=0) != 0)
    slot = tl.load(span_at, mask=samples, other=0).to(tl.int64)
    position = tl.load(position_ptr + s, mask=samples, other=0)
    token_ids = tl.load(token_ids_ptr + s, mask=samples, other=0)
    is_valid = samples & (tl.load(is_valid_ptr + s, mask=samples, other=0) != 0)
    field_at = fields_ptr + slot * _FIELDS
    is_stop = tl.zeros([BLOCK], tl.int1)
    for stop in tl.static_range(_FIRST_STOP, _FIELDS):
        is_stop |= tl.load(field_at + stop, mask=samples, other=-1) == token_ids
    is_stop &= is_valid & (position >= tl.load(field_at + _MIN_LENGTH, mask=samples, other=0))
    tl.store(
        slot_tokens_ptr + slot * max_length + position, token_ids.to(tl.int32), mask=samples & (position < max_length)
    )
    # both ints in one write, as it crosses the link
    drawn = (tl.where(is_valid, token_ids, -1) & 0xFFFFFFFF) | (is_stop.to(tl.int64) << 32)
    tl.store(drawn_ptr + tl.load(message_ptr + 3).to(tl.int64) * max_seqs + s, drawn, mask=s < num_seqs)


def launch_fetch_words(host: Tensor, device: Tensor) -> None:
    """Run the kernel; see `fetch_words`."""
    num_words = len(device)
    _fetch_words[(min(triton.cdiv(num_words, _FETCH_WORDS), _FETCH_PROGRAMS),)](
        host, device, num_words, BLOCK=_FETCH_WORDS, num_warps=4
    )


def launch_fetch_message(messages_BI: Tensor, turn: Tensor, message: Tensor) -> None:
    """Run the kernel; see `fetch_message`."""
    num_words = messages_BI.shape[1]
    _fetch_message[(triton.cdiv(num_words, _MESSAGE_WORDS),)](
        messages_BI, turn, message, len(messages_BI), num_words, BLOCK=_MESSAGE_WORDS, num_warps=2
    )


def launch_start_slots(state: SlotState, starts: Tensor, token_ids: Tensor) -> None:
    """Run the kernel; see `start_slots`."""
    if len(starts):
        _start_slots[(len(starts), 4)](
            starts, token_ids, state.token_ids_NL, state.fields_NW, state.token_ids_NL.shape[1], BLOCK=512
        )


def launch_append_blocks(state: SlotState, counts: Tensor, appends: Tensor, num_programs: int) -> None:
    """Run the kernel; see `append_blocks`."""
    tables = state.block_tables_NB
    _append_blocks[(num_programs,)](counts, appends, tables, tables.shape[1], BLOCK=256)


def launch_expand_spans(state: SlotState, message: Tensor, rows: StepRows, block_size: int) -> None:
    """Run the kernel; see `expand_spans`."""
    num_rows, num_seqs, sampling = len(rows.token_ids_T), len(rows.kv_lengths_S), rows.sampling
    _expand_spans[(num_seqs + 1, 1 if num_rows <= num_seqs else _PARTS)](
        message,
        state.token_ids_NL,
        state.block_tables_NB,
        state.fields_NW,
        rows.token_ids_T,
        rows.positions_T,
        rows.slot_mapping_T,
        rows.query_starts,
        rows.kv_lengths_S,
        rows.block_tables_SB,
        rows.last_rows_S,
        sampling.temperature_S,
        sampling.top_k_S,
        sampling.top_p_S,
        sampling.min_p_S,
        sampling.seed_S,
        sampling.position_S,
        num_seqs,
        num_rows,
        state.token_ids_NL.shape[1],
        state.block_tables_NB.shape[1],
        PAGE=block_size,
        BLOCK=128,
    )


def launch_note_drawn(
    state: SlotState, message: Tensor, rows: StepRows, token_ids_S: Tensor, is_valid_S: Tensor, drawn_BS2: Tensor
) -> None:
    """Run the kernel; see `note_drawn`."""
    num_seqs = len(rows.kv_lengths_S)
    _note_drawn[(triton.cdiv(num_seqs, 128),)](
        message,
        token_ids_S,
        is_valid_S,
        rows.sampling.position_S,
        state.fields_NW,
        state.token_ids_NL,
        drawn_BS2.view(torch.int64),
        num_seqs,
        drawn_BS2.shape[1],
        state.token_ids_NL.shape[1],
        BLOCK=128,
    )
