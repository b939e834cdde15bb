"""What the engine needs of whatever runs its steps: tensors on a device, or the fake in `flashtensors.testing`."""

from __future__ import annotations

from typing import Protocol

from ..step import RunnerLimits, StepPlan, StepResult


class Runner(Protocol):
    """Executes steps in the order they were launched.

    Two promises carry the engine's lookahead and its prefix sharing:

    1. Steps execute in launch order, each on the state that the one before it left. A block or slot that the engine
       took from one sequence and gave to another in a later plan is therefore never read by the wrong one.
    2. Within a step, every layer writes the keys and values of all spans before any span attends. A span may
       therefore read blocks that an earlier span of the same step fills.
    """

    @property
    def limits(self) -> RunnerLimits:
        """What the engine plans within; constant."""
        ...

    def launch(self, plan: StepPlan) -> None:
        """Start a step without waiting for it.

        At most `limits.max_steps_in_flight` steps are launched and not yet collected.

        Raises:
            StepPostponed: It is to be launched again, before any other.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest launched step and return what it drew."""
        ...
