"""What a model's engine sees of the dock that the model lies at."""

from __future__ import annotations

from ..runner.device_runner import DeviceRunner
from ..step import RunnerLimits, StepPlan, StepResult


class MooredRunner:
    """A runner for one engine, which may change docks between two lives of its model while its KV cache is kept.

    Args:
        runner: Of the dock.
        limits: For this engine: the dock's, with the KV cache that this model got.
    """

    def __init__(self, runner: DeviceRunner, limits: RunnerLimits) -> None:
        self.limits = limits
        self._runner: DeviceRunner | None = runner

    def launch(self, plan: StepPlan) -> None:
        """Start a step without waiting for it."""
        assert self._runner is not None, "the model has left its dock"
        self._runner.launch(plan)

    def collect(self) -> StepResult:
        """Wait for the oldest launched step and return what it drew."""
        assert self._runner is not None, "the model has left its dock"
        return self._runner.collect()

    def unmoor(self) -> None:
        """Let go of the dock's runner, whose memory may be given back now."""
        self._runner = None

    def moor(self, runner: DeviceRunner) -> None:
        """Go on at another dock of the same signature, behind which the same KV cache lies."""
        self._runner = runner
