"""Commands reach a worker in order, and it neither sleeps through one nor spins without one."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from flashtensors.worker.inbox import Inbox
from flashtensors.worker.messages import Command, Ping, Shutdown, UnloadModel

NEVER_S = 20.0
"""Only a test that fails waits for so long."""


class Diary:
    """Stands in for a worker: notes what it is told, and works for as many steps as it was given."""

    def __init__(self, num_busy_steps: int = 0, deadline_s: float | None = None) -> None:
        self.is_closed = False
        self.commands: list[Command] = []
        self.num_steps = 0
        self._num_busy_steps = num_busy_steps
        self._deadline_s = deadline_s
        self.stepped = threading.Event()

    def next_deadline(self) -> float | None:
        return self._deadline_s

    def handle(self, command: Command) -> None:
        self.commands.append(command)
        self.is_closed = self.is_closed or isinstance(command, Shutdown)

    def step(self) -> bool:
        self.num_steps += 1
        self._deadline_s = None
        self.stepped.set()
        return self.num_steps <= self._num_busy_steps


def serve(inbox: Inbox, diary: Any) -> threading.Thread:
    thread = threading.Thread(target=inbox.serve, args=(diary,))
    thread.start()
    return thread


def test_commands_of_several_threads_each_arrive_once_and_in_their_order() -> None:
    inbox, diary = Inbox(), Diary()
    thread = serve(inbox, diary)

    def send(name: str) -> None:
        for number in range(100):
            inbox.put(UnloadModel(model=f"{name}{number}"))

    senders = [threading.Thread(target=send, args=(name,)) for name in "ab"]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(NEVER_S)
    inbox.put(Shutdown())
    thread.join(NEVER_S)
    models = [command.model for command in diary.commands if isinstance(command, UnloadModel)]
    for name in "ab":
        assert [model for model in models if model[0] == name] == [f"{name}{number}" for number in range(100)]
    assert len(models) == 200


def test_a_busy_worker_steps_on_without_commands_and_then_blocks() -> None:
    inbox, diary = Inbox(), Diary(num_busy_steps=50)
    inbox.put(Ping())
    thread = serve(inbox, diary)
    while diary.num_steps < 51:
        assert diary.stepped.wait(NEVER_S)
        time.sleep(0.001)
    time.sleep(0.02)
    assert diary.num_steps == 51
    inbox.put(Shutdown())
    thread.join(NEVER_S)


@pytest.mark.parametrize("is_rung", [True, False])
def test_a_ring_and_a_deadline_wake_it(is_rung: bool) -> None:
    inbox, diary = Inbox(), Diary(deadline_s=None if is_rung else time.monotonic() + 0.01)
    thread = serve(inbox, diary)
    if is_rung:
        inbox.ring()
    assert diary.stepped.wait(NEVER_S)
    inbox.put(Shutdown())
    thread.join(NEVER_S)
    assert [type(command) for command in diary.commands] == [Shutdown]


def test_nothing_steps_after_the_end() -> None:
    inbox, diary = Inbox(), Diary(num_busy_steps=10)
    inbox.put(Shutdown())
    inbox.serve(diary)  # pyright: ignore[reportArgumentType]
    assert diary.num_steps == 0
