"""Runs steps with torch: keeps the KV caches and the slots, calls the model, draws tokens.

On a CUDA device `launch` only queues work, and what was drawn travels to pinned host memory behind it; `collect` waits
for that copy alone. On a CPU `launch` computes.

Shapes: R rows that sample, V vocabulary, K stop tokens.
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
from ..kernels.penalties import adjust_logits
from ..kernels.sampling import sample
from ..memory.arena import Arena
from ..models.layers import Gate
from ..models.registry import Model
from ..step import RunnerLimits, StepPlan, StepResult
from .kv_layout import place_kv_caches
from .logprobs import PendingLogprobs, queue_logprobs
from .slots import SlotTable
from .step_inputs import StepInputs, build_inputs

NOT_FINITE = (
    "the model's logits are not finite numbers; its weights are damaged, or overflow the dtype it computes in: "
    "try bfloat16 or float32"
)
"""Why a sequence fails whose logits are NaN or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _StepInFlight:
    """What a launched step will have drawn once `arrived` is reached."""

    step: int
    slots_R: np.ndarray
    stop_ids_RK: np.ndarray
    token_ids_R: Tensor
    """-1 where logits were not finite."""
    logprobs: PendingLogprobs | None
    arrived: torch.cuda.Event | None


class TorchRunner(Closing):
    """Implements `engine.runner_protocol.Runner` for one model on one device.

    Args:
        model: Borrowed; its weights are on `device`.
        config: Its shape.
        limits: What to hold.
        device: Where steps run.
        dtype: Of the KV caches.
        kv_arena: Where the KV caches lie, in chunks (`KvLayout`); borrowed. None: memory for `limits.num_blocks` is
            allocated now and lives until `close`.

    Raises:
        CapacityError: No room for the KV caches.
    """

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        *,
        limits: RunnerLimits,
        device: torch.device,
        dtype: torch.dtype,
        kv_arena: Arena | None = None,
    ) -> None:
        self.limits = limits
        self.num_captures = 0
        """Graphs captured: none, ever."""
        self._model = model
        self._device = device
        self._slots = SlotTable(limits, vocab_size=config.vocab_size, device=device)
        self._layout, self._own_arena, self.kv_caches = place_kv_caches(config, limits, device, dtype, kv_arena)
        self._gate: Gate | None = None
        self._in_flight: deque[_StepInFlight] = deque()

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
        """Start a step."""
        assert len(plan.spans), "a step without spans"
        assert len(self._in_flight) < self.limits.max_steps_in_flight, "too many steps in flight"
        for start in plan.starts:
            self._slots.start(start)
        self._slots.append_blocks(plan.block_appends, self._layout)
        inputs = build_inputs(plan.spans, self._slots, self.limits.block_size)
        logits_RV = self._model.forward(
            inputs.token_ids_T,
            inputs.positions_T,
            self.kv_caches,
            inputs.batch,
            inputs.sample_rows_R,
            gate=self._gate,
        )
        self._in_flight.append(self._draw(plan.step, logits_RV.float(), inputs))

    def collect(self) -> StepResult:
        """Wait for the oldest launched step and return what it drew."""
        step = self._in_flight.popleft()
        if step.arrived is not None:
            step.arrived.synchronize()
        token_ids_R = step.token_ids_R.numpy().astype(np.int32)
        return StepResult(
            step=step.step,
            slots=step.slots_R.astype(np.int32),
            token_ids=token_ids_R.clip(min=0),
            is_stopped=((step.stop_ids_RK == token_ids_R[:, None]) & (token_ids_R[:, None] >= 0)).any(axis=1),
            logprobs={} if step.logprobs is None else step.logprobs.unpack(),
            failed=dict.fromkeys(step.slots_R[token_ids_R < 0].tolist(), NOT_FINITE),
        )

    def close(self) -> None:
        """Give up the KV caches; steps in flight are forgotten."""
        self._in_flight.clear()
        self.kv_caches = []
        if self._own_arena is not None:
            self._own_arena.close()

    def _draw(self, step: int, logits_RV: Tensor, inputs: StepInputs) -> _StepInFlight:
        """Queue sampling, the note of what was drawn in the slots, and its way to the host."""
        slots_R, positions_R = inputs.sample_slots_R, inputs.sample_positions_R
        table = self._slots
        stop_ids_RK = table.stop_ids(slots_R, positions_R)
        if len(slots_R) == 0:
            token_ids_R = torch.empty(0, dtype=torch.int64)
            return _StepInFlight(
                step=step,
                slots_R=slots_R,
                stop_ids_RK=stop_ids_RK,
                token_ids_R=token_ids_R,
                logprobs=None,
                arrived=None,
            )
        adjust_logits(logits_RV, table.addends(slots_R, positions_R), table.penalties(slots_R, positions_R))
        token_ids_R, is_valid_R = sample(logits_RV, table.draws(slots_R, positions_R))
        self._append_tokens(slots_R, positions_R, token_ids_R)
        return _StepInFlight(
            step=step,
            slots_R=slots_R,
            stop_ids_RK=stop_ids_RK,
            token_ids_R=self._to_host(token_ids_R.where(is_valid_R, -1)),
            logprobs=queue_logprobs(table.wanted_logprobs(slots_R), logits_RV, token_ids_R),
            arrived=self._record_arrival(),
        )

    def _append_tokens(self, slots_R: np.ndarray, positions_R: np.ndarray, token_ids_R: Tensor) -> None:
        token_ids_NL = self._slots.token_ids_NL
        assert positions_R.max() < token_ids_NL.shape[1], "a token was drawn beyond max_model_len"
        entries_R = torch.from_numpy(slots_R * token_ids_NL.shape[1] + positions_R)
        entries_R = entries_R.to(self._device, non_blocking=True)
        token_ids_NL.view(-1).index_copy_(0, entries_R, token_ids_R.to(token_ids_NL.dtype))

    def _to_host(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory; from a device, in pinned memory and not before `arrived`."""
        return tensor.to("cpu", non_blocking=True)

    def _record_arrival(self) -> torch.cuda.Event | None:
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
