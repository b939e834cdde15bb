"""What the runner keeps of running sequences, by slot: token ids, block tables, sampling parameters.

Only `SlotStart` and block appends change it from outside; a step reads it by fancy indexing, without a loop in Python.

Shapes: N slots, L tokens of the longest sequence, B blocks of the longest block table, A blocks to append, S rows that
sample, R of them, K stop tokens of the row that has most.
"""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.penalties import Addends, Penalties
from ..kernels.sampling import Draws
from ..kernels.step_rows import (
    FIRST_STOP,
    MIN_LENGTH,
    MIN_P,
    NUM_FIELDS,
    NUM_STOPS,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from ..step import RunnerLimits, SlotStart
from .kv_layout import KvLayout

_GREEDY, _PLAIN, _TRUNCATED = range(3)

CHANGES_LOGITS, HAS_MIN_LENGTH, HAS_NUCLEUS, HAS_MANY_STOPS = 1, 2, 4, 8
"""What a sequence needs beyond a plain draw, as bits: penalties, bias or logprobs; stop tokens masked at first; top-p
without top-k; more stop tokens than a device's slots hold."""


class SlotTable:
    """State of every slot. Token ids live on the device, because steps write what they drew; the rest on the host."""

    def __init__(self, limits: RunnerLimits, *, vocab_size: int, device: torch.device) -> None:
        num_slots = limits.max_slots
        max_blocks = -(-limits.max_model_len // limits.block_size)
        self.token_ids_NL = torch.zeros((num_slots, limits.max_model_len), dtype=torch.int32, device=device)
        self.block_tables_NB = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self._vocab_size = vocab_size
        self._device = device
        self._starts: list[SlotStart | None] = [None] * num_slots
        self._kind_N = np.zeros(num_slots, dtype=np.int8)
        self._temperature_N = np.zeros(num_slots, dtype=np.float32)
        self._top_k_N = np.zeros(num_slots, dtype=np.int64)
        self._top_p_N = np.ones(num_slots, dtype=np.float64)
        self._min_p_N = np.zeros(num_slots, dtype=np.float32)
        self._seed_N = np.zeros(num_slots, dtype=np.int64)
        self._num_prompt_tokens_N = np.zeros(num_slots, dtype=np.int64)
        self._penalties_N3 = np.zeros((num_slots, 3), dtype=np.float32)
        self._has_penalties_N = np.zeros(num_slots, dtype=bool)
        self._min_length_N = np.zeros(num_slots, dtype=np.int64)
        self._has_addends_N = np.zeros(num_slots, dtype=bool)
        self._num_logprobs_N = np.full(num_slots, -1, dtype=np.int64)
        self._needs_N = np.zeros(num_slots, dtype=np.uint8)
        self._stop_ids_NK = np.full((num_slots, 1), -1, dtype=np.int64)

    def start(self, start: SlotStart) -> None:
        """Put a sequence into its slot; the block table is empty then."""
        token_ids = torch.from_numpy(np.array(start.token_ids, dtype=np.int32))
        self.token_ids_NL[start.slot, : len(token_ids)].copy_(token_ids, non_blocking=True)
        self.note(start)

    def note(self, start: SlotStart) -> None:
        """Know a sequence whose tokens someone else writes to its slot."""
        slot, sampling = start.slot, start.sampling
        self._starts[slot] = start
        is_truncated = 0 < sampling.top_k < self._vocab_size or sampling.top_p < 1.0
        self._kind_N[slot] = _GREEDY if sampling.temperature == 0 else _TRUNCATED if is_truncated else _PLAIN
        self._temperature_N[slot] = sampling.temperature
        self._top_k_N[slot] = sampling.top_k if sampling.top_k < self._vocab_size else 0
        self._top_p_N[slot] = sampling.top_p
        self._min_p_N[slot] = sampling.min_p
        self._seed_N[slot] = (start.seed + 2**63) % 2**64 - 2**63  # the same 64 bits with a sign
        self._num_prompt_tokens_N[slot] = start.num_prompt_tokens
        penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        self._penalties_N3[slot] = penalties
        self._has_penalties_N[slot] = penalties != (1.0, 0.0, 0.0)
        self._min_length_N[slot] = start.num_prompt_tokens + sampling.min_tokens
        self._has_addends_N[slot] = bool(sampling.logit_bias) or sampling.min_tokens > 0
        self._num_logprobs_N[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._set_stop_ids(slot, start.stop_token_ids)
        changes_logits = penalties != (1.0, 0.0, 0.0) or bool(sampling.logit_bias) or sampling.logprobs is not None
        has_nucleus = sampling.temperature > 0 and sampling.top_p < 1.0 and self._top_k_N[slot] == 0
        self._needs_N[slot] = (
            CHANGES_LOGITS * changes_logits
            | HAS_MIN_LENGTH * (sampling.min_tokens > 0)
            | HAS_NUCLEUS * bool(has_nucleus)
            | HAS_MANY_STOPS * (len(start.stop_token_ids) > NUM_STOPS)
        )

    def needs(self, slots_S: np.ndarray, positions_S: np.ndarray) -> int:
        """What any of these rows needs beyond a plain draw of the token at its position, as bits."""
        needs = int(np.bitwise_or.reduce(self._needs_N[slots_S]))
        if needs & HAS_MIN_LENGTH and (positions_S >= self._min_length_N[slots_S]).all():
            needs &= ~HAS_MIN_LENGTH
        return needs

    def fields(self, slots: list[int]) -> np.ndarray:
        """What a device keeps of slots, int64 [slots, NUM_FIELDS]."""
        fields = np.empty((len(slots), NUM_FIELDS), dtype=np.int64)
        fractions = fields.view(np.float64)
        fractions[:, TEMPERATURE] = self._temperature_N[slots]
        fields[:, TOP_K] = self._top_k_N[slots]
        fractions[:, TOP_P] = self._top_p_N[slots]
        fractions[:, MIN_P] = self._min_p_N[slots]
        fields[:, SEED] = self._seed_N[slots]
        fields[:, MIN_LENGTH] = self._min_length_N[slots]
        stop_ids = self._stop_ids_NK[slots, :NUM_STOPS]
        fields[:, FIRST_STOP:] = -1
        fields[:, FIRST_STOP : FIRST_STOP + stop_ids.shape[1]] = stop_ids
        return fields

    def append_blocks(self, appends_A3: np.ndarray, layout: KvLayout) -> None:
        """Grow block tables by rows of (slot, index in its table, block id); they hold the blocks' units."""
        slots_A, indices_A, block_ids_A = appends_A3.T
        self.block_tables_NB[slots_A, indices_A] = layout.unit_ids(block_ids_A)

    def stop_ids(self, slots_S: np.ndarray, positions_S: np.ndarray) -> np.ndarray:
        """Tokens that end each row's answer when drawn at `positions_S`, [S, K], filled up with -1."""
        may_stop_S = positions_S >= self._min_length_N[slots_S]
        return np.where(may_stop_S[:, None], self._stop_ids_NK[slots_S], -1)

    def _set_stop_ids(self, slot: int, stop_token_ids: list[int]) -> None:
        missing = len(stop_token_ids) - self._stop_ids_NK.shape[1]
        if missing > 0:
            self._stop_ids_NK = np.pad(self._stop_ids_NK, ((0, 0), (0, missing)), constant_values=-1)
        self._stop_ids_NK[slot] = -1
        self._stop_ids_NK[slot, : len(stop_token_ids)] = stop_token_ids

    def wanted_logprobs(self, slots_S: np.ndarray) -> list[tuple[int, int, int]]:
        """Row, slot, and number of alternatives of each row that wants logprobs."""
        rows = np.flatnonzero(self._num_logprobs_N[slots_S] >= 0)
        return [(row, slot, int(self._num_logprobs_N[slot])) for row in rows.tolist() for slot in [int(slots_S[row])]]

    def draws(self, slots_S: np.ndarray, positions_S: np.ndarray) -> list[Draws]:
        """How the rows that do not choose greedily draw the tokens at `positions_S`."""
        kind_S = self._kind_N[slots_S]
        groups = []
        for kind in (_PLAIN, _TRUNCATED):
            rows_R = np.flatnonzero(kind_S == kind)
            if not len(rows_R):
                continue
            slots_R = slots_S[rows_R]
            groups.append(
                Draws.of(
                    rows=rows_R,
                    temperature=self._temperature_N[slots_R],
                    top_k=self._top_k_N[slots_R],
                    top_p=self._top_p_N[slots_R],
                    min_p=self._min_p_N[slots_R],
                    seed=self._seed_N[slots_R],
                    position=positions_S[rows_R],
                    device=self._device,
                )
            )
        return groups

    def penalties(self, slots_S: np.ndarray, positions_S: np.ndarray) -> Penalties | None:
        """Penalties of the rows that use them, counted over the tokens before `positions_S`."""
        rows_R = np.flatnonzero(self._has_penalties_N[slots_S])
        if not len(rows_R):
            return None
        slots_R, num_tokens_R = slots_S[rows_R], positions_S[rows_R]
        factors_3P = np.zeros((3, -(-len(rows_R) // 4) * 4), dtype=np.float32)  # rows that begin at 16 bytes
        factors_3P[:, : len(rows_R)] = self._penalties_N3[slots_R].T
        factors_3R = self._to_device(factors_3P)[:, : len(rows_R)]
        return Penalties(
            rows_R=self._to_device(rows_R),
            token_ids_RL=self.token_ids_NL,
            token_rows_R=self._to_device(slots_R),
            num_prompt_tokens_R=self._to_device(self._num_prompt_tokens_N[slots_R]),
            num_tokens_R=self._to_device(num_tokens_R),
            repetition_R=factors_3R[0],
            presence_R=factors_3R[1],
            frequency_R=factors_3R[2],
        )

    def addends(self, slots_S: np.ndarray, positions_S: np.ndarray) -> Addends | None:
        """Logit biases, and stop tokens that are masked because the answer is still too short.

        Ids beyond the vocabulary are passed over: no such token can be drawn.
        """
        rows: list[int] = []
        token_ids: list[int] = []
        values: list[float] = []
        for row in np.flatnonzero(self._has_addends_N[slots_S]).tolist():
            slot = int(slots_S[row])
            start = self._starts[slot]
            assert start is not None
            entries = list(start.sampling.logit_bias.items())
            if positions_S[row] < self._min_length_N[slot]:
                entries += [(token_id, -np.inf) for token_id in start.stop_token_ids]
            for token_id, value in entries:
                if token_id < self._vocab_size:
                    rows.append(row)
                    token_ids.append(token_id)
                    values.append(value)
        if not rows:
            return None
        return Addends(
            rows_N=self._to_device(np.array(rows)),
            token_ids_N=self._to_device(np.array(token_ids)),
            values_N=self._to_device(np.array(values, dtype=np.float32)),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
