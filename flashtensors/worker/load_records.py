"""What is remembered of each load: where its bytes came from, and how long each phase took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..residency.actions import AdmitLoad, AnswerFill, AnswerLoad, ReportUnload
from ..residency.rates import Rates
from ..transfer.pipeline import LoadStats
from .loading import LoadedModel
from .messages import (
    Event,
    LoadFailed,
    ModelLanded,
    ModelLoaded,
    ModelReady,
    ModelUnloaded,
    Prefetched,
    WireError,
)


@dataclass(slots=True)
class _Record:
    source: str
    waited_s: float
    admitted_s: float
    phase_seconds: dict[str, float] = field(default_factory=dict)
    has_ended: bool = False


class LoadRecords:
    """Records of loads by model, the latest one of each.

    Args:
        rates: What learns from loads how fast bytes come.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._records: dict[str, _Record] = {}
        self._plan_seconds: dict[str, float] = {}

    def note_plan(self, model: str, seconds: float) -> None:
        """The next load of `model` waited for its plan for `seconds`."""
        self._plan_seconds[model] = seconds

    def begin(self, action: AdmitLoad) -> None:
        """A load begins."""
        plan_s = self._plan_seconds.pop(action.model, None)
        phases = {"queue": max(0.0, action.waited_s - (plan_s or 0.0))}
        if plan_s is not None:
            phases["plan"] = plan_s
        self._records[action.model] = _Record(action.source.value, action.waited_s, time.perf_counter(), phases)

    def ready(self, model: str, loaded: LoadedModel) -> ModelReady:
        """Requests may start."""
        record = self._records[model]
        record.phase_seconds |= _own_phases(loaded.phase_seconds)
        return ModelReady(
            model=model,
            weight_bytes=loaded.weight_bytes,
            kv_cache_bytes=loaded.kv_cache_bytes,
            max_model_len=loaded.limits.max_model_len,
            dtype=loaded.dtype,
            source=record.source,
        )

    def landed(self, model: str, stats: LoadStats, host_bytes: int) -> ModelLanded:
        """Every byte is there."""
        record, disk_bytes = self._records[model], max(0, stats.num_bytes - stats.host_tier_bytes)
        phases = {"read", "copy"}
        if disk_bytes and "copy" in stats.phase_seconds:  # a model on a GPU is prepared while files are read
            phases.add("prepare")
        seconds = sum(stats.phase_seconds.get(phase, 0.0) for phase in phases)
        self._rates.observe(disk_bytes=disk_bytes, num_bytes=stats.num_bytes, seconds=seconds)
        record.has_ended = True
        record.phase_seconds |= _own_phases(stats.phase_seconds)
        return ModelLanded(
            model=model,
            source=record.source,
            num_bytes=stats.num_bytes,
            disk_bytes=disk_bytes,
            host_bytes=host_bytes,
            reader=stats.reader,
            total_s=record.waited_s + time.perf_counter() - record.admitted_s,
            phase_seconds=record.phase_seconds,
        )

    def fail(self, model: str) -> bool:
        """Something failed for the model; whether it was a load."""
        record = self._records.get(model)
        was_loading = record is not None and not record.has_ended
        if record is not None:
            record.has_ended = True
        return was_loading

    def answer(
        self, action: AnswerLoad | AnswerFill | ReportUnload, loaded: Mapping[str, LoadedModel], image_bytes: int
    ) -> Event:
        """What those who asked are told.

        Args:
            action: The machine's answer.
            loaded: Models on the device.
            image_bytes: Of the model's whole image in host memory.
        """
        model = action.model
        match action:
            case AnswerLoad(error=None, was_loaded=was_loaded):
                return self._model_loaded(model, loaded[model], was_loaded=was_loaded)
            case AnswerLoad(error=error):
                assert error is not None, "the case above has those without"
                return LoadFailed(model=model, error=WireError.of(error))
            case AnswerFill(host_bytes=host_bytes, error=error):
                wire = error and WireError.of(error)
                return Prefetched(model=model, host_bytes=host_bytes, image_bytes=image_bytes, error=wire)
            case ReportUnload(reason=reason):
                return ModelUnloaded(model=model, reason=reason)

    def _model_loaded(self, model: str, loaded: LoadedModel, *, was_loaded: bool) -> ModelLoaded:
        return ModelLoaded(
            model=model,
            weight_bytes=loaded.weight_bytes,
            kv_cache_bytes=loaded.kv_cache_bytes,
            num_kv_blocks=loaded.limits.num_blocks,
            block_size=loaded.limits.block_size,
            max_model_len=loaded.limits.max_model_len,
            dtype=loaded.dtype,
            phase_seconds=self._records[model].phase_seconds,
            was_loaded=was_loaded,
        )


def _own_phases(phase_seconds: dict[str, float]) -> dict[str, float]:
    """Phases of this load alone: a plan is made once, and its seconds come with each load."""
    return {phase: seconds for phase, seconds in phase_seconds.items() if phase != "plan"}
