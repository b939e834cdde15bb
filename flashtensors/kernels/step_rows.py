"""From what the engine says of a step to the rows that a model computes, and from what was drawn back to the slots.

The state of running sequences lives in slots on the device. A step begins with a message of a few ints, from which
kernels make the rows of the whole batch, and ends with a token for each sequence, which a kernel writes to its slot:
nothing waits for the host, and nothing but the message changes between two steps of the same shape.

A message is int32:

    num_appends, num_spans, num_tokens, host buffer of what is drawn, 4 unused
    S spans       slot, start, num_tokens, samples, first row
    G groups      first span, num_spans, prefix tokens           (for attention; read nowhere here)
    A appends     slot, index in its block table, unit

Shapes: N slots, L tokens of the longest sequence, B blocks of the longest block table, T rows and S sequences of the
step's bucket (what is not used is padding), W fields of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling_rows import SamplingRows

HEADER_INTS = 8
SPAN_INTS = 5
GROUP_INTS = 3
APPEND_INTS = 3

NUM_FIELDS = 16
"""W: int64 of a slot. Fractions are the bits of a float64."""
TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, MIN_LENGTH, FIRST_STOP = range(7)
NUM_STOPS = NUM_FIELDS - FIRST_STOP
"""Stop tokens that a slot holds; -1 where there are fewer."""

START_INTS = NUM_FIELDS + 3
"""int64 of a start: slot, number of tokens, where they begin, then the fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """What the device keeps of every slot."""

    token_ids_NL: Tensor
    """int32."""
    block_tables_NB: Tensor
    """int32 units of the KV cache."""
    fields_NW: Tensor
    """int64."""

    @classmethod
    def empty(cls, num_slots: int, max_length: int, max_blocks: int, device: torch.device | str) -> SlotState:
        """Slots that hold nothing."""
        return cls(
            token_ids_NL=torch.zeros((num_slots, max_length), dtype=torch.int32, device=device),
            block_tables_NB=torch.zeros((num_slots, max_blocks), dtype=torch.int32, device=device),
            fields_NW=torch.zeros((num_slots, NUM_FIELDS), dtype=torch.int64, device=device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """A step as a model and a sampler take it; contiguous, and at the same addresses in every step."""

    token_ids_T: Tensor
    """int32; -1 in padding."""
    positions_T: Tensor
    """int64."""
    slot_mapping_T: Tensor
    """int64, unit * block_size + offset; -1 in padding."""
    query_starts: Tensor
    """int32 [S + 1]."""
    kv_lengths_S: Tensor
    """int32; 0 in padding."""
    block_tables_SB: Tensor
    """int32."""
    last_rows_S: Tensor
    """int64: the last row of each sequence, whose logits choose its next token; a valid row in padding."""
    sampling: SamplingRows
    """Greedy where nothing is drawn."""

    @classmethod
    def empty(cls, num_rows: int, num_seqs: int, max_blocks: int, device: torch.device | str) -> StepRows:
        """Rows for steps of at most this size."""
        return cls(
            token_ids_T=torch.zeros(num_rows, dtype=torch.int32, device=device),
            positions_T=torch.zeros(num_rows, dtype=torch.int64, device=device),
            slot_mapping_T=torch.zeros(num_rows, dtype=torch.int64, device=device),
            query_starts=torch.zeros(num_seqs + 1, dtype=torch.int32, device=device),
            kv_lengths_S=torch.zeros(num_seqs, dtype=torch.int32, device=device),
            block_tables_SB=torch.zeros((num_seqs, max_blocks), dtype=torch.int32, device=device),
            last_rows_S=torch.zeros(num_seqs, dtype=torch.int64, device=device),
            sampling=SamplingRows.greedy(num_seqs, device),
        )

    def first(self, num_rows: int, num_seqs: int) -> StepRows:
        """The part for a smaller step; the same memory."""
        return StepRows(
            token_ids_T=self.token_ids_T[:num_rows],
            positions_T=self.positions_T[:num_rows],
            slot_mapping_T=self.slot_mapping_T[:num_rows],
            query_starts=self.query_starts[: num_seqs + 1],
            kv_lengths_S=self.kv_lengths_S[:num_seqs],
            block_tables_SB=self.block_tables_SB[:num_seqs],
            last_rows_S=self.last_rows_S[:num_seqs],
            sampling=self.sampling.part(0, num_seqs),
        )


def fetch_words(host: Tensor, device: Tensor) -> None:
    """Copy page-locked host memory to the device by a kernel, in the order of the current stream.

    A copy would queue at the copy engine behind all bytes of a model that is being loaded.

    Args:
        host: int32, page-locked where `device` is on a GPU; read when the stream comes to it.
        device: int32, as long; written.
    """
    from .step_kernel import launch_fetch_words

    launch_fetch_words(host, device)


def fetch_message(messages_BI: Tensor, turn: Tensor, message: Tensor) -> None:
    """Copy the next message from host memory, in the order of the current stream; a graph can, for any step.

    Args:
        messages_BI: int32, contiguous, page-locked where `message` is on a GPU: messages of B steps, which take turns.
            Those of 256 sequences are 30 KB, so they are fetched as a whole, whatever of them is used: how much that is
            would be one more wait for the link.
        turn: int32 [2]: which of them is next, then 0; mutated.
        message: int32 [I]; written.
    """
    from .step_kernel import launch_fetch_message

    launch_fetch_message(messages_BI, turn, message)


def start_slots(state: SlotState, starts: Tensor, token_ids: Tensor) -> None:
    """Fill slots with new sequences.

    Args:
        state: Mutated.
        starts: int64 [starts, START_INTS].
        token_ids: int32, of all starts one after another.
    """
    from .step_kernel import launch_start_slots

    launch_start_slots(state, starts, token_ids)


def append_blocks(state: SlotState, counts: Tensor, appends: Tensor, *, num_programs: int = 4) -> None:
    """Grow block tables.

    Args:
        state: Mutated.
        counts: int32; the first says how many appends there are.
        appends: int32, that many rows of slot, index and unit.
        num_programs: Programs that share them.
    """
    from .step_kernel import launch_append_blocks

    launch_append_blocks(state, counts, appends, num_programs)


def expand_spans(state: SlotState, message: Tensor, rows: StepRows, *, block_size: int) -> None:
    """Make all rows of a step from its message.

    Args:
        state: Read.
        message: int32, laid out for the S of `rows`.
        rows: Filled; T and S are the bucket's.
        block_size: Tokens in a block.
    """
    from .step_kernel import launch_expand_spans

    launch_expand_spans(state, message, rows, block_size)


def note_drawn(
    state: SlotState, message: Tensor, rows: StepRows, token_ids_S: Tensor, is_valid_S: Tensor, drawn_BS2: Tensor
) -> None:
    """Write drawn tokens to their slots, and to the host with whether each ends its answer.

    A copy to the host would be two launches more, and would wait for the copy engine.

    Args:
        state: Its token ids are mutated.
        message: The step's.
        rows: The step's.
        token_ids_S: int64 as drawn; only those of spans that sample count.
        is_valid_S: bool.
        drawn_BS2: int32, contiguous, page-locked where the state is on a GPU: for B host buffers the token, or -1 where
            logits are not finite numbers, and whether it ends the answer. The message says which is written.
    """
    from .step_kernel import launch_note_drawn

    launch_note_drawn(state, message, rows, token_ids_S, is_valid_S, drawn_BS2)


def expand_spans_reference(state: SlotState, message: Tensor, rows: StepRows, *, block_size: int) -> StepRows:
    """`expand_spans` span by span on the host, into new tensors."""
    num_rows, num_seqs = len(rows.token_ids_T), len(rows.kv_lengths_S)
    out = StepRows.empty(num_rows, num_seqs, state.block_tables_NB.shape[1], "cpu")
    out.token_ids_T.fill_(-1)
    out.slot_mapping_T.fill_(-1)
    num_spans, num_tokens = message[1:3].tolist()
    out.query_starts.fill_(num_tokens)
    out.query_starts[0] = 0
    out.last_rows_S.fill_(max(num_tokens - 1, 0))
    spans = message[HEADER_INTS : HEADER_INTS + num_spans * SPAN_INTS].view(-1, SPAN_INTS)
    for s, (slot, start, count, samples, first) in enumerate(spans.tolist()):
        at, positions = slice(first, first + count), torch.arange(start, start + count)
        out.token_ids_T[at] = state.token_ids_NL[slot, positions]
        out.positions_T[at] = positions
        units = state.block_tables_NB[slot, positions // block_size].long()
        out.slot_mapping_T[at] = units * block_size + positions % block_size
        out.query_starts[s + 1] = first + count
        out.kv_lengths_S[s] = start + count
        num_blocks = -(-(start + count) // block_size)
        out.block_tables_SB[s, :num_blocks] = state.block_tables_NB[slot, :num_blocks]
        out.last_rows_S[s] = first + count - 1
        out.sampling.position_S[s] = start + count
        if samples:
            ints, fractions = state.fields_NW[slot], state.fields_NW[slot].view(torch.float64)
            out.sampling.temperature_S[s] = fractions[TEMPERATURE]
            out.sampling.top_k_S[s] = ints[TOP_K]
            out.sampling.top_p_S[s] = fractions[TOP_P]
            out.sampling.min_p_S[s] = fractions[MIN_P]
            out.sampling.seed_S[s] = ints[SEED]
    return out
