"""Slots on the device, and how changes of them get there: one packed message for each step, from pinned memory.

Messages are fetched one after another on the stream of the steps, so the device needs one buffer; the host needs one
for each step that may be in flight, as it is read while later ones are being filled.

Shapes: A blocks to append, T tokens of new sequences.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.step_rows import (
    APPEND_INTS,
    GROUP_INTS,
    HEADER_INTS,
    SPAN_INTS,
    START_INTS,
    SlotState,
    StepRows,
    append_blocks,
    fetch_message,
    fetch_words,
    start_slots,
)
from ..step import RunnerLimits, SlotStart, StepPlan
from .kv_layout import KvLayout
from .slots import SlotTable

MAX_GROUPS = 64
"""Most groups of a step; those that save least are left out."""

MAX_APPENDS = 2048
"""Blocks that a message may append; more travel with the starts that need them."""

_COUNTS_INTS = 4

_ALIGNED_INTS = 32
"""Messages begin at multiples of a sector, as they are fetched by vectors."""


class DeviceSlots:
    """State of slots on the device, and the rows of the step that is under way.

    Whoever sends a start has noted it in the table.

    Args:
        limits: Sizes.
        table: Keeps on the host what is asked there; its token ids are the device's.
        layout: Of the KV cache.
        device: Where steps run.
    """

    def __init__(self, limits: RunnerLimits, table: SlotTable, layout: KvLayout, device: torch.device) -> None:
        max_blocks = table.block_tables_NB.shape[1]
        self._table = table
        self._layout = layout
        self._block_size = limits.block_size
        state = SlotState.empty(limits.max_slots, 1, max_blocks, device)
        self.state = replace(state, token_ids_NL=table.token_ids_NL)
        self.rows = StepRows.empty(limits.max_tokens_per_step, limits.max_slots, max_blocks, device)
        num_ints = HEADER_INTS + SPAN_INTS * limits.max_slots + GROUP_INTS * MAX_GROUPS + APPEND_INTS * MAX_APPENDS
        num_ints = -(-num_ints // _ALIGNED_INTS) * _ALIGNED_INTS
        self.message = torch.zeros(num_ints, dtype=torch.int32, device=device)
        num_messages = limits.max_steps_in_flight
        self._messages = _pinned(4 * num_ints * num_messages, device).view(torch.int32).view(num_messages, num_ints)
        self._message_arrays = [*self._messages.numpy()]
        self._turn = torch.zeros(2, dtype=torch.int32, device=device)
        self._next_turn: int | None = 0
        self._starts = [_pinned(1 << 20, device) for _ in range(limits.max_steps_in_flight)]
        self._device_starts = torch.empty(1 << 20, dtype=torch.uint8, device=device)

    def groups(self, num_seqs: int) -> Tensor:
        """int32 [MAX_GROUPS, 3] of the message, where it is laid out for so many sequences."""
        begin = HEADER_INTS + SPAN_INTS * num_seqs
        return self.message[begin : begin + GROUP_INTS * MAX_GROUPS].view(-1, GROUP_INTS)

    def appends(self, num_seqs: int, *, has_groups: bool) -> Tensor:
        """int32 rows of the message, likewise."""
        begin = HEADER_INTS + SPAN_INTS * num_seqs + GROUP_INTS * MAX_GROUPS * has_groups
        num_rows = (len(self.message) - begin) // APPEND_INTS
        return self.message[begin : begin + APPEND_INTS * num_rows].view(-1, APPEND_INTS)

    def send(self, plan: StepPlan, num_seqs: int, *, has_groups: bool, buffer: int) -> None:
        """Write the message that the step's graph fetches, and queue the starts before it.

        Args:
            plan: The step.
            num_seqs: Sequences of its bucket.
            has_groups: Whether the graph takes groups.
            buffer: Which host buffer is free, for this message and for what is drawn.
        """
        appends = plan.block_appends
        if plan.starts or len(appends) > MAX_APPENDS:
            self._send_starts(plan.starts, appends, buffer)
            appends = appends[:0]
        message, spans = self._message_arrays[buffer], plan.spans
        message[0], message[1], message[3] = len(appends), len(spans), buffer
        rows = message[HEADER_INTS : HEADER_INTS + SPAN_INTS * len(spans)].reshape(-1, SPAN_INTS)
        rows[:, :4] = spans
        ends = spans[:, 2].cumsum()
        rows[0, 4], rows[1:, 4], message[2] = 0, ends[:-1], ends[-1]
        end = HEADER_INTS + SPAN_INTS * num_seqs
        if has_groups:
            groups = message[end : end + GROUP_INTS * MAX_GROUPS].reshape(-1, GROUP_INTS)
            chosen = _most_useful(plan.groups)
            groups[len(chosen) :] = 0
            groups[: len(chosen)] = chosen * np.array([1, 1, self._block_size], dtype=np.int32)
            end += GROUP_INTS * MAX_GROUPS
        if len(appends):
            self._lay_out(appends, message[end : end + APPEND_INTS * len(appends)])
        if self._next_turn != buffer:  # the step before was not queued whole
            self._turn.copy_(torch.tensor([buffer, 0], dtype=torch.int32))
        self._next_turn = None

    def fetch(self) -> None:
        """Queue that the message sent last becomes `message`; part of every step."""
        fetch_message(self._messages, self._turn, self.message)

    def end_turn(self, buffer: int) -> None:
        """The step of this buffer is queued whole."""
        self._next_turn = (buffer + 1) % len(self._messages)

    def _send_starts(self, starts: list[SlotStart], appends_A3: np.ndarray, buffer: int) -> None:
        """Queue new sequences with their blocks: how much that is, no graph can know."""
        tokens = [np.asarray(start.token_ids, dtype=np.int32) for start in starts]
        sizes = np.array([len(token_ids) for token_ids in tokens], dtype=np.int64)
        num_ints = int(sizes.sum()) + _COUNTS_INTS + APPEND_INTS * len(appends_A3)
        starts_bytes = 8 * START_INTS * len(starts)
        host = self._room_for_starts(starts_bytes + 4 * num_ints, buffer)
        slots = [start.slot for start in starts]
        rows = host[:starts_bytes].view(torch.int64).numpy().reshape(-1, START_INTS)
        rows[:, 0], rows[:, 1], rows[:, 2] = slots, sizes, sizes.cumsum() - sizes
        rows[:, 3:] = self._table.fields(slots)
        ints = host[starts_bytes : starts_bytes + 4 * num_ints].view(torch.int32).numpy()
        counts_at = int(sizes.sum())
        if tokens:
            np.concatenate(tokens, out=ints[:counts_at])
        appends_at = counts_at + _COUNTS_INTS
        ints[counts_at:appends_at] = len(appends_A3)
        self._lay_out(appends_A3, ints[appends_at:])
        device = self._device_starts[: starts_bytes + 4 * num_ints]
        fetch_words(host[: len(device)].view(torch.int32), device.view(torch.int32))
        device_ints = device[starts_bytes:].view(torch.int32)
        start_slots(self.state, device[:starts_bytes].view(torch.int64).view(-1, START_INTS), device_ints[:counts_at])
        append_blocks(self.state, device_ints[counts_at:], device_ints[appends_at:], num_programs=32)

    def _room_for_starts(self, num_bytes: int, buffer: int) -> Tensor:
        if num_bytes > len(self._starts[buffer]):
            self._starts[buffer] = _pinned(2 * num_bytes, self.message.device)
        if num_bytes > len(self._device_starts):
            if self._device_starts.is_cuda:  # it was not allocated on the stream that still reads it
                self._device_starts.record_stream(torch.cuda.current_stream(self._device_starts.device))
            self._device_starts = torch.empty(2 * num_bytes, dtype=torch.uint8, device=self.message.device)
        return self._starts[buffer]

    def _lay_out(self, appends_A3: np.ndarray, ints: np.ndarray) -> None:
        rows = ints.reshape(-1, APPEND_INTS)
        rows[:] = appends_A3
        rows[:, 2] = self._layout.unit_ids(appends_A3[:, 2])


def _most_useful(groups_G3: np.ndarray) -> np.ndarray:
    """At most `MAX_GROUPS` groups, in their order."""
    if len(groups_G3) <= MAX_GROUPS:
        return groups_G3
    num_saved = (groups_G3[:, 1] - 1) * groups_G3[:, 2]
    return groups_G3[np.sort(np.argsort(-num_saved, kind="stable")[:MAX_GROUPS])]


def _pinned(num_bytes: int, device: torch.device) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
