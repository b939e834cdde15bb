"""What whoever keeps models on a device needs of a runner, beyond what the engine does."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from ..models.layers import Gate
from ..step import RunnerLimits, StepPlan, StepResult


class DeviceRunner(Protocol):
    """A runner over addresses: the weights and the KV blocks behind them may become another model's."""

    @property
    def limits(self) -> RunnerLimits:
        """What the engine plans within; changes with `dock` alone."""
        ...

    @property
    def num_captures(self) -> int:
        """CUDA graphs captured since the runner was made."""
        ...

    def launch(self, plan: StepPlan) -> None:
        """Start a step without waiting for it; after an error of the gate, it can be launched once more."""
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest launched step and return what it drew."""
        ...

    def dock(self, num_blocks: int, gate: Gate | None = None) -> None:
        """Begin another life: weights of the same layout lie, or are landing, behind the same addresses.

        All slots are empty and no step is in flight; nothing is captured.

        Args:
            num_blocks: KV blocks behind the arena's addresses, from its beginning.
            gate: Called before each layer's kernels are queued, while weights are landing; steps run without graphs
                until `gate_open`.
        """
        ...

    def gate_open(self) -> None:
        """All weights have landed: the gate is not asked any more."""
        ...

    def close(self) -> None:
        """Give up all graphs, and the KV cache if it is the runner's own; steps in flight are forgotten."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
