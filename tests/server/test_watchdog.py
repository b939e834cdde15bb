import asyncio

import pytest

from flashtensors.server import watchdog
from flashtensors.server.watchdog import Watchdog
from flashtensors.worker.messages import Command, Event, Ping


class SilentLink:
    """A worker that lives and says nothing."""

    def __init__(self) -> None:
        self.sent: list[Command] = []
        self.is_killed = False

    def send(self, command: Command) -> None:
        self.sent.append(command)

    def kill(self) -> None:
        self.is_killed = True

    async def receive(self) -> Event:
        raise AssertionError("the supervisor receives")

    async def close(self) -> None:
        raise AssertionError("the supervisor closes")


def test_a_worker_that_never_gets_ready_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "START_TIMEOUT_S", 0.02)
    link = SilentLink()

    async def scenario() -> None:
        dog = Watchdog(link, 1000.0)
        await asyncio.wait_for(dog.watch(), 10)
        assert dog.error is not None
        assert "not ready after" in dog.error.message

    asyncio.run(scenario())
    assert link.is_killed
    assert link.sent == []


def test_a_worker_that_falls_silent_is_pinged_and_then_ended() -> None:
    link = SilentLink()

    async def scenario() -> None:
        dog = Watchdog(link, 0.04)
        dog.hear_ready("cuda:0")
        await asyncio.wait_for(dog.watch(), 10)
        assert dog.error is not None
        assert "worker_timeout_s is 0.04" in dog.error.message

    asyncio.run(scenario())
    assert link.is_killed
    assert set(map(type, link.sent)) == {Ping}
