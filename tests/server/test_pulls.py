"""One download for many who ask; none for nobody."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashtensors.checkpoint import pull as pull_module
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.progress import PullProgress
from flashtensors.config import Settings
from flashtensors.errors import PullError
from flashtensors.server.pulls import PullCall, Pulls

CALL = PullCall(reference="org/model")


class FakePull:
    """Stands for `pull`: reports, and ends when it is let go."""

    def __init__(self, store: Path) -> None:
        self.num_calls = 0
        self.may_end = threading.Event()
        self.was_stopped = threading.Event()
        self._record = Catalog(store).get("tiny")

    def __call__(self, catalog: Catalog, reference: str, *, progress, **_: object) -> object:
        self.num_calls += 1
        done = 0
        try:
            while not self.may_end.wait(0.005):
                done += 1
                progress(PullProgress(status="downloading", file="x", done_bytes=done, total_bytes=1 << 30))
        except PullError:
            self.was_stopped.set()
            raise
        if reference == "org/broken":
            raise PullError("the link broke")
        return self._record


@pytest.fixture
def fake_pull(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePull]:
    fake = FakePull(tiny_store)
    monkeypatch.setattr(pull_module, "pull", fake)
    yield fake
    fake.may_end.set()


async def follow(pulls: Pulls, call: PullCall) -> list[dict[str, object]]:
    return [report async for report in pulls.follow(call)]


def test_two_who_ask_for_one_reference_share_one_pull(store: Path, fake_pull: FakePull) -> None:
    async def scenario() -> list[list[dict[str, object]]]:
        async with Pulls(Catalog(store), Settings(storage_path=str(store))) as pulls:
            followers = [asyncio.create_task(follow(pulls, CALL)) for _ in range(5)]
            await asyncio.sleep(0.15)
            fake_pull.may_end.set()
            return await asyncio.gather(*followers)

    reports = asyncio.run(scenario())
    assert fake_pull.num_calls == 1
    for seen in reports:
        assert seen[-1] == {"status": "success", "model": "tiny"}
        assert len(seen) >= 2
        assert set(seen[0]) == {"status", "total", "completed"}


def test_a_pull_that_nobody_follows_any_more_is_stopped(store: Path, fake_pull: FakePull) -> None:
    async def scenario() -> None:
        async with Pulls(Catalog(store), Settings(storage_path=str(store))) as pulls:
            first, second = (asyncio.create_task(follow(pulls, CALL)) for _ in range(2))
            await asyncio.sleep(0.05)
            first.cancel()
            await asyncio.sleep(0.05)
            assert not fake_pull.was_stopped.is_set()
            second.cancel()
            await asyncio.wait({first, second})
            assert await asyncio.to_thread(fake_pull.was_stopped.wait, 5)

    asyncio.run(scenario())


def test_all_who_follow_hear_of_a_failure(store: Path, fake_pull: FakePull) -> None:
    async def scenario() -> list[BaseException | list[dict[str, object]]]:
        async with Pulls(Catalog(store), Settings(storage_path=str(store))) as pulls:
            call = PullCall(reference="org/broken")
            followers = [asyncio.create_task(follow(pulls, call)) for _ in range(2)]
            await asyncio.sleep(0.02)
            fake_pull.may_end.set()
            return await asyncio.gather(*followers, return_exceptions=True)

    assert [type(result) for result in asyncio.run(scenario())] == [PullError, PullError]


def test_leaving_stops_what_runs(store: Path, fake_pull: FakePull) -> None:
    async def scenario() -> None:
        async with Pulls(Catalog(store), Settings(storage_path=str(store))) as pulls:
            task = asyncio.create_task(follow(pulls, CALL))
            await asyncio.sleep(0.05)
        assert await asyncio.to_thread(fake_pull.was_stopped.wait, 5)
        await asyncio.wait({task})
        assert isinstance(task.exception(), PullError)

    asyncio.run(scenario())
