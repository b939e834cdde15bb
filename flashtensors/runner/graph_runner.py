"""Runs steps on a GPU: all state of sequences is there, and a step is one message in and one CUDA graph.

The graph applies changes, makes the rows of the step, plans attention, runs the model, draws tokens, tests for ends and
writes what it drew back to the slots. Nothing in it depends on a length that the host knows, so it serves every step of
its bucket, and every model that docks. Where logits must be changed or looked at (penalties, biases, logprobs, stop
tokens that are not allowed yet), a graph of the same step without its end runs, and tokens are drawn behind it.

`launch` never waits; `collect` waits for its step alone, whose last kernel writes what was drawn to host memory.

Shapes: S spans, R of them that sample, V vocabulary, K stop tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..checkpoint.architecture import ModelConfig
from ..closing import Closing
from ..kernels.attention.batch import AttentionBatch
from ..kernels.fp8 import FP8_DTYPE
from ..kernels.rope_append import KvScales
from ..kernels.step_rows import StepRows, append_blocks, expand_spans, note_drawn
from ..memory.arena import Arena
from ..models.layers import Gate
from ..models.registry import Model
from ..step import RunnerLimits, StepPlan, StepResult
from .buckets import StepShape, shape_of
from .changed_draws import draw_changed, unpack_logprobs
from .device_slots import MAX_GROUPS, DeviceSlots
from .kv_layout import place_kv_caches
from .logprobs import PendingLogprobs
from .slots import CHANGES_LOGITS, HAS_MANY_STOPS, HAS_MIN_LENGTH, HAS_NUCLEUS, SlotTable
from .step_graphs import StepGraphs
from .torch_runner import NOT_FINITE
from .workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepInFlight:
    """A launched step; what it drew is in host buffer `buffer` once the event there is reached."""

    step: int
    buffer: int
    slots_R: np.ndarray
    sampling_R: np.ndarray | None
    """Which spans sample; None: all."""
    num_spans: int
    stop_ids_RK: np.ndarray | None
    """Where a slot on the device does not hold all of them."""
    logprobs: list[PendingLogprobs]


class GraphRunner(Closing):
    """Implements `DeviceRunner` for one model on one GPU.

    Args:
        model: Borrowed; its weights are, or will be, on the workspace's device.
        config: Its shape.
        limits: What to hold.
        dtype: Of weights.
        workspace: Borrowed.
        kv_arena: Where the KV caches lie, in chunks; borrowed. None: memory for `limits.num_blocks` of its own.
        kv_dtype: Of the KV caches: `dtype`, which None means, or float8_e4m3fn, which halves what decoding reads.
        enforce_eager: Capture nothing.

    Raises:
        CapacityError: No room for KV caches of its own.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        *,
        limits: RunnerLimits,
        dtype: torch.dtype,
        workspace: Workspace,
        kv_arena: Arena | None = None,
        kv_dtype: torch.dtype | None = None,
        enforce_eager: bool = False,
    ) -> None:
        device = workspace.device
        self.limits = limits
        self._model = model
        self._workspace = workspace
        self._layout, self._own_arena, self.kv_caches = place_kv_caches(
            config, limits, device, kv_dtype or dtype, kv_arena
        )
        with torch.inference_mode():
            self._table = SlotTable(limits, vocab_size=config.vocab_size, device=device)
            self._slots = DeviceSlots(limits, self._table, self._layout, device)
            self._rotations = model.make_rotations(limits.max_model_len)
            ones_K = torch.ones(config.num_key_value_heads, device=device)
            self._kv_scales = KvScales(k_scale_K=ones_K, v_scale_K=ones_K) if kv_dtype == FP8_DTYPE else None
        self._works = {
            window: workspace.attention_work(
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                max_seqs=limits.max_slots,
                max_tokens=limits.max_tokens_per_step,
                dtype=dtype,
                kv_dtype=kv_dtype or dtype,
                sliding_window=window,
                max_groups=MAX_GROUPS,
            )
            for window in _windows(config)
        }
        self._graphs = StepGraphs(workspace, self._run_step, enforce_eager=enforce_eager)
        self._gate: Gate | None = None
        self._last: tuple[StepShape, int] | None = None
        num_buffers = limits.max_steps_in_flight
        is_cuda = device.type == "cuda"
        self._drawn_BS2 = torch.empty((num_buffers, limits.max_slots, 2), dtype=torch.int32, pin_memory=is_cuda)
        self._drawn_array = self._drawn_BS2.numpy()
        self._arrivals = [torch.cuda.Event() if is_cuda else None for _ in range(num_buffers)]
        if is_cuda:
            # All of this was not queued on the steps' stream, where another thread may be capturing a graph.
            torch.cuda.current_stream(device).synchronize()
        self._num_launched = 0
        self._in_flight: deque[_StepInFlight] = deque()

    @property
    def num_captures(self) -> int:
        """Graphs captured since the runner was made."""
        return self._graphs.num_captures

    def dock(self, num_blocks: int, gate: Gate | None = None) -> None:
        """Begin another life over the same addresses; see `DeviceRunner.dock`."""
        assert not self._in_flight, "steps are in flight"
        self.limits = msgspec.structs.replace(self.limits, num_blocks=num_blocks)
        self._gate = gate

    def gate_open(self) -> None:
        """All weights have landed."""
        self._gate = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        """Start a step without waiting for it."""
        assert len(plan.spans), "a step without spans"
        assert len(self._in_flight) < self.limits.max_steps_in_flight, "too many steps in flight"
        buffer = self._num_launched % len(self._drawn_BS2)
        with self._workspace.on_stream():
            for start in plan.starts:
                self._table.note(start)
            shape, needs = self._choose_shape(plan)
            self._slots.send(plan, shape.num_seqs, has_groups=shape.has_groups, buffer=buffer)
            logits_SV = self._graphs.run(shape, self._gate)
            self._slots.end_turn(buffer)
            logprobs = [] if shape.draws else self._draw_behind(plan, shape, logits_SV)
            arrival = self._arrivals[buffer]
            if arrival is not None:
                arrival.record(self._workspace.stream)
        self._num_launched += 1
        self._in_flight.append(self._remember(plan, buffer, needs, logprobs))

    def collect(self) -> StepResult:
        """Wait for the oldest launched step and return what it drew."""
        step = self._in_flight.popleft()
        arrival = self._arrivals[step.buffer]
        if arrival is not None:
            arrival.synchronize()
        drawn_R2 = self._drawn_array[step.buffer, : step.num_spans]
        drawn_R2 = drawn_R2.copy() if step.sampling_R is None else drawn_R2[step.sampling_R]
        token_ids_R, is_stopped_R = drawn_R2[:, 0], drawn_R2[:, 1].astype(bool)
        is_failed_R = token_ids_R < 0
        failed = {}
        if is_failed_R.any():
            failed = dict.fromkeys(step.slots_R[is_failed_R].tolist(), NOT_FINITE)
            token_ids_R = token_ids_R.clip(min=0)
        if step.stop_ids_RK is not None:
            is_stopped_R = (step.stop_ids_RK == token_ids_R[:, None]).any(axis=1) & ~is_failed_R
        return StepResult(
            step=step.step,
            slots=step.slots_R,
            token_ids=token_ids_R,
            is_stopped=is_stopped_R,
            logprobs=unpack_logprobs(step.logprobs),
            failed=failed,
        )

    def close(self) -> None:
        """Give up graphs and slots, and KV caches of its own; steps in flight end and are forgotten."""
        self._workspace.wait_for_steps()
        self._in_flight.clear()
        self._graphs.close()
        self.kv_caches = []
        if self._own_arena is not None:
            self._own_arena.close()

    def _choose_shape(self, plan: StepPlan) -> tuple[StepShape, int]:
        """The bucket of a step, and what its sequences need beyond a plain draw."""
        last = self._last
        if plan.is_steady and last is not None and last[0].is_decode and not last[1] & HAS_MIN_LENGTH:
            return last
        slots_S, starts_S, num_tokens_S, _ = plan.spans.T
        needs = self._table.needs(slots_S, starts_S + num_tokens_S)
        draws = not needs & (CHANGES_LOGITS | HAS_MIN_LENGTH)
        has_nuclei = draws and bool(needs & HAS_NUCLEUS)
        self._last = shape_of(plan, self.limits, draws=draws, has_nuclei=has_nuclei), needs
        return self._last

    def _run_step(self, shape: StepShape, gate: Gate | None) -> Tensor:
        """Queue everything from the message to logits, and to drawn tokens where the shape says so."""
        slots, state = self._slots, self._slots.state
        rows = slots.rows.first(shape.num_rows, shape.num_seqs)
        slots.fetch()
        append_blocks(state, slots.message, slots.appends(shape.num_seqs, has_groups=shape.has_groups))
        expand_spans(state, slots.message, rows, block_size=self.limits.block_size)
        for work in self._works.values():
            work.plan(
                rows.query_starts,
                rows.kv_lengths_S,
                groups=slots.groups(shape.num_seqs) if shape.has_groups else None,
                max_query_tokens=1 if shape.is_decode else None,
                reads_ahead=shape.is_decode,
            )
        batch = AttentionBatch(
            query_starts=rows.query_starts,
            kv_lengths=rows.kv_lengths_S,
            block_tables=rows.block_tables_SB,
            slot_mapping=rows.slot_mapping_T,
            spans=(),
            works=self._works,
            kv_scales=self._kv_scales,
        )
        logits_SV = self._model.forward(
            rows.token_ids_T,
            rows.positions_T,
            self.kv_caches,
            batch,
            None if shape.is_decode else rows.last_rows_S,
            rotations=self._rotations,
            gate=gate,
        )
        if shape.draws:
            self._draw(logits_SV, rows, has_nuclei=shape.has_nuclei)
        return logits_SV

    def _draw(self, logits_SV: Tensor, rows: StepRows, *, has_nuclei: bool) -> None:
        """Draw from `logits_SV`, and note what was drawn."""
        from ..kernels.sampling_launch import launch_sample

        sampled = launch_sample(logits_SV, rows.sampling, has_nuclei=has_nuclei)
        note_drawn(
            self._slots.state, self._slots.message, rows, sampled.token_ids_S, sampled.is_valid_S, self._drawn_BS2
        )

    def _draw_behind(self, plan: StepPlan, shape: StepShape, logits_SV: Tensor) -> list[PendingLogprobs]:
        """Draw as single sequences ask for, note it, and return the logprobs that they want."""
        rows = self._slots.rows.first(shape.num_rows, len(plan.spans))
        token_ids_S, is_valid_S, logprobs = draw_changed(plan.spans, self._table, logits_SV, rows.sampling)
        note_drawn(self._slots.state, self._slots.message, rows, token_ids_S, is_valid_S, self._drawn_BS2)
        return logprobs

    def _remember(self, plan: StepPlan, buffer: int, needs: int, logprobs: list[PendingLogprobs]) -> _StepInFlight:
        spans, sampling_R = plan.spans, None
        if not plan.is_steady and not spans[:, 3].all():
            sampling_R = np.flatnonzero(spans[:, 3])
            spans = spans[sampling_R]
        stop_ids_RK = None
        if needs & HAS_MANY_STOPS:
            stop_ids_RK = self._table.stop_ids(spans[:, 0], spans[:, 1] + spans[:, 2])
        return _StepInFlight(
            step=plan.step,
            buffer=buffer,
            slots_R=spans[:, 0],
            sampling_R=sampling_R,
            num_spans=len(plan.spans),
            stop_ids_RK=stop_ids_RK,
            logprobs=logprobs,
        )


def _windows(config: ModelConfig) -> list[int | None]:
    """The sliding windows of its layers; None is a layer that sees everything."""
    if not config.sliding_layers:
        return [None]
    return sorted({config.sliding_window if is_sliding else None for is_sliding in config.sliding_layers}, key=str)
