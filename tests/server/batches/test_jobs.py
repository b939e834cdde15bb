"""Batches in front of a scripted model: every request has one result whatever happens in between."""

import asyncio
import contextlib
import json
import os
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from flashtensors.errors import (
    CapacityError,
    ContextTooLong,
    ModelNotFound,
    ObjectNotFound,
    RequestError,
    StoreError,
    WorkerError,
)
from flashtensors.server.batches import jobs, run
from flashtensors.server.batches.input import BatchInput, InputChecker
from flashtensors.server.batches.jobs import BatchJobs
from flashtensors.server.batches.records import BatchRecord, BatchStore
from flashtensors.server.batches.results import Result, ResultLog
from flashtensors.server.batches.window import Window, WindowLimits
from flashtensors.server.files import FileStore

ENDPOINT = "/v1/completions"
MODELS = {"tiny": True, "plain": True}


class Model:
    """Answers with the prompt; counts, delays and fails as told."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.order: list[str] = []
        self.num_in_flight = self.most_in_flight = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: dict[str, list[Exception]] = {}
        self.num_before_pause: int | None = None
        """Answers after which the gate closes."""
        self.is_full = False
        """Whether there is no room for requests."""
        self.killers: set[str] = set()
        """Prompts of which the worker dies, with all that is in flight."""
        self.num_deaths = self.num_bytes_in_flight = self.most_bytes_in_flight = 0

    async def __call__(self, endpoint: str, body: bytes, request_id: str) -> object:
        fields = json.loads(body)
        prompt = str(fields["prompt"])
        self.asked[prompt] += 1
        self.order.append(fields["model"])
        self.num_in_flight += fields.get("n", 1)
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        self.num_bytes_in_flight += len(body)
        self.most_bytes_in_flight = max(self.most_bytes_in_flight, self.num_bytes_in_flight)
        num_deaths = self.num_deaths
        try:
            await asyncio.sleep(0)
            if self.is_full:
                return None
            await self.gate.wait()
            self.num_deaths += prompt in self.killers
            if self.killers:
                await asyncio.sleep(0)
            if self.num_deaths > num_deaths:
                raise WorkerError("died")
            if self.num_before_pause is not None:
                self.num_before_pause -= 1
                if self.num_before_pause <= 0:
                    self.num_before_pause = None
                    self.gate.clear()
            if self.failures.get(prompt):
                raise self.failures[prompt].pop(0)
            return {"text": prompt}
        finally:
            self.num_in_flight -= fields.get("n", 1)
            self.num_bytes_in_flight -= len(body)


class Daemon:
    """What outlives a daemon (the folder), and what does not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now_s = folder, 1_000_000.0
        self.files: FileStore
        self.jobs: BatchJobs
        self.model = Model()

    @contextlib.asynccontextmanager
    async def running(self, window: int = 8):
        self.files = FileStore(self.folder / "files", clock=lambda: self.now_s)
        self.jobs = BatchJobs(
            BatchStore(self.folder / "batches"),
            self.files,
            self.model,
            check_model=_check_model,
            make_window=lambda: Window(WindowLimits(num_sure=window, num_most=window, num_spare=0), lambda _: None),
            clock=lambda: self.now_s,
        )
        async with self.jobs:
            yield self.jobs

    async def start(self, num_lines: int, output_expires_after_s: int | None = None, **changes: object) -> BatchRecord:
        path = self.files.new_partial()
        models = ("tiny", "plain")
        path.write_text(
            "".join(
                json.dumps(
                    {
                        "custom_id": f"id-{n}",
                        "method": "POST",
                        "url": ENDPOINT,
                        "body": {"model": models[n % 2], "prompt": f"p{n}"} | changes,
                    }
                )
                + "\n"
                for n in range(num_lines)
            )
        )
        file = self.files.publish(path, filename="in.jsonl", purpose="batch")
        return await self.jobs.create(file.id, ENDPOINT, metadata=None, output_expires_after_s=output_expires_after_s)

    async def start_and_pause(self) -> BatchRecord:
        """A batch of 50 requests, of which 10 have been answered when the model pauses."""
        self.model.num_before_pause = 10
        record = await self.start(50)
        return await self.until(record.id, lambda record: record.num_completed == 10)

    async def until(self, batch_id: str, is_so: Callable[[BatchRecord], bool]) -> BatchRecord:
        async with asyncio.timeout(20):
            while not is_so(record := self.jobs.get(batch_id)):
                await asyncio.sleep(0.001)
        return record

    async def end(self, batch_id: str) -> BatchRecord:
        return await self.until(batch_id, lambda record: record.is_final)

    def results(self, record: BatchRecord) -> tuple[dict[str, dict], dict[str, dict]]:
        """Answers and failures by custom id, which must occur once."""
        found: list[dict[str, dict]] = []
        for file_id in (record.output_file_id, record.error_file_id):
            texts = [] if file_id is None else self.files.path(file_id).read_text().splitlines()
            entries = [json.loads(text) for text in texts]
            found.append({entry["custom_id"]: entry for entry in entries})
            assert len(found[-1]) == len(entries)
        assert not found[0].keys() & found[1].keys()
        return found[0], found[1]


def _check_model(name: str) -> None:
    if not MODELS.get(name):
        raise ModelNotFound(f"no model {name}")


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon(tmp_path)


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(jobs, "RETRY_DISK_S", 0.0)


def test_every_request_is_answered_once_within_the_window(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=5):
            record = await daemon.end((await daemon.start(40)).id)
            assert (record.status, record.num_total, record.num_completed, record.num_failed) == (
                "completed",
                40,
                40,
                0,
            )
            answers, failures = daemon.results(record)
            assert failures == {}
            assert record.error_file_id is None
            assert {name: entry["response"]["body"]["text"] for name, entry in answers.items()} == {
                f"id-{n}": f"p{n}" for n in range(40)
            }
        assert daemon.model.most_in_flight == 5
        assert daemon.model.order == ["tiny"] * 20 + ["plain"] * 20
        assert set((daemon.folder / "batches").iterdir()) == {daemon.folder / "batches" / f"{record.id}.json"}

    asyncio.run(scenario())


def test_requests_for_many_answers_fill_the_window_faster(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=9):
            await daemon.end((await daemon.start(10, n=4)).id)
            assert daemon.model.most_in_flight == 8
            await daemon.end((await daemon.start(4, n=50)).id)
            assert daemon.model.most_in_flight == 50

    asyncio.run(scenario())


def test_refused_requests_have_their_error_and_busy_ones_are_tried_again(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.failures = {
            "p1": [ContextTooLong("too long")],
            "p2": [CapacityError("full"), WorkerError("died"), CapacityError("full")],
            "p3": [WorkerError("died")] * 100,
        }
        async with daemon.running():
            record = await daemon.end((await daemon.start(6)).id)
            answers, failures = daemon.results(record)
            assert (record.status, record.num_completed, record.num_failed) == ("completed", 4, 2)
            assert {name: entry["response"]["status_code"] for name, entry in failures.items()} == {
                "id-1": 400,
                "id-3": 503,
            }
            assert "id-2" in answers
            assert daemon.model.asked["p2"] == 4
            assert daemon.model.asked["p3"] == 1 + run.MAX_DEATHS_ALONE

    asyncio.run(scenario())


def test_a_request_that_finds_no_memory_is_tried_for_a_while(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.failures = {
            "p0": [CapacityError("full")] * (run.MAX_TRIES - 1),
            "p1": [CapacityError("full")] * 99,
        }
        async with daemon.running():
            answers, failures = daemon.results(await daemon.end((await daemon.start(3)).id))
            assert (answers.keys(), failures.keys()) == ({"id-0", "id-2"}, {"id-1"})
            assert daemon.model.asked["p1"] == run.MAX_TRIES

    asyncio.run(scenario())


def test_a_request_whose_model_finds_no_disk_is_tried_for_a_while(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.failures = {
            "p0": [StoreError("too many open files")] * (run.MAX_TRIES - 1),
            "p1": [StoreError("too many open files")] * 99,
            "p2": [ModelNotFound("gone")] * 99,
        }
        async with daemon.running():
            answers, failures = daemon.results(await daemon.end((await daemon.start(4)).id))
            assert (answers.keys(), failures.keys()) == ({"id-0", "id-3"}, {"id-1", "id-2"})
            assert (daemon.model.asked["p1"], daemon.model.asked["p2"]) == (run.MAX_TRIES, 1)

    asyncio.run(scenario())


def test_a_bug_that_one_request_finds_is_the_end_of_that_request(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.failures = {"p40": [KeyError("a secret of the daemon")]}
        async with daemon.running(window=4):
            record = await daemon.end((await daemon.start(50)).id)
            answers, failures = daemon.results(record)
            assert (record.status, len(answers), failures.keys()) == ("completed", 49, {"id-40"})
            response = failures["id-40"]["response"]
            assert (response["status_code"], response["body"]["error"]["code"]) == (500, "internal_error")
            assert "secret" not in json.dumps(response)

    asyncio.run(scenario())


def test_a_bug_in_between_keeps_what_was_answered(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    append, publish, num_calls = ResultLog.append, FileStore.publish, Counter[str]()

    def fail_in_the_end(self: ResultLog, results: Sequence[Result]) -> None:
        num_calls["append"] += 1
        if num_calls["append"] == 5:
            raise KeyError("a secret of the daemon")
        append(self, results)

    def fail_first(self: FileStore, *args: object, **options: object):
        num_calls["publish"] += options["purpose"] == "batch_output"
        if num_calls["publish"] == 1:
            raise KeyError("a secret of the daemon")
        return publish(self, *args, **options)  # pyright: ignore

    monkeypatch.setattr(ResultLog, "append", fail_in_the_end)
    monkeypatch.setattr(FileStore, "publish", fail_first)

    async def scenario() -> None:
        async with daemon.running(window=1):
            record = await daemon.end((await daemon.start(20)).id)
            assert (record.status, [error.code for error in record.errors]) == ("failed", ["internal_error"])
            assert "secret" not in record.errors[0].message
            answers, failures = daemon.results(record)
            assert (record.num_total, record.num_completed, record.num_failed) == (20, 4, 0)
            assert (len(answers), failures) == (4, {})
            assert record.failed_at is not None

    asyncio.run(scenario())


@pytest.mark.parametrize("window", [1, 8, 100])
def test_only_the_requests_that_kill_the_worker_fail(daemon: Daemon, window: int) -> None:
    async def scenario() -> None:
        killers = daemon.model.killers = {"p5", "p6", "p30", "p39"}
        async with daemon.running(window):
            record = await daemon.end((await daemon.start(40)).id)
            answers, failures = daemon.results(record)
            assert (record.status, len(answers)) == ("completed", 36)
            assert failures.keys() == {prompt.replace("p", "id-") for prompt in killers}
            assert {entry["response"]["status_code"] for entry in failures.values()} == {503}
        num_tries = 1 + run.MAX_DEATHS_ALONE
        assert daemon.model.num_deaths <= num_tries * len(killers)
        assert all(daemon.model.asked[f"p{number}"] <= 2 for number in range(40) if f"p{number}" not in killers)
        assert daemon.model.most_in_flight == min(window, 40)

    asyncio.run(scenario())


def test_a_worker_that_dies_of_something_else_costs_no_request(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.failures = {f"p{number}": [WorkerError("died")] * 2 for number in range(20)}
        async with daemon.running():
            record = await daemon.end((await daemon.start(20)).id)
            assert (record.num_completed, record.num_failed) == (20, 0)

    asyncio.run(scenario())


def test_suspects_without_a_result_are_refused_when_their_batch_is_cancelled(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.failures = {f"p{number}": [WorkerError("died")] for number in range(12)}
        async with daemon.running(window=12):
            record = await daemon.start(12)
            await daemon.until(record.id, lambda _: max(daemon.model.asked.values(), default=0) == 2)
            daemon.model.is_full = True
            await daemon.jobs.cancel(record.id)
            answers, failures = daemon.results(await daemon.end(record.id))
            assert len(answers) + len(failures) == 12
            assert {entry["error"]["code"] for entry in failures.values()} == {"batch_cancelled"}

    asyncio.run(scenario())


def test_the_bodies_in_flight_are_bounded(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(run, "MAX_BODY_BYTES_IN_FLIGHT", 5_000)
        async with daemon.running(window=8):
            record = await daemon.end((await daemon.start(20, user="u" * 1_500)).id)
            assert (record.num_completed, daemon.model.most_in_flight) == (20, 3)
            assert daemon.model.most_bytes_in_flight <= 5_000
            record = await daemon.end((await daemon.start(4, user="u" * 50_000)).id)
            assert record.num_completed == 4, "a body larger than the bound goes alone"
            assert 50_000 < daemon.model.most_bytes_in_flight < 100_000

    asyncio.run(scenario())


def test_a_request_waits_for_room_for_longer_than_it_is_tried(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.is_full = True
        daemon.model.failures = {"p1": [WorkerError("died")]}
        async with daemon.running(window=4):
            record = await daemon.start(6)
            waiting = await daemon.until(record.id, lambda _: daemon.model.asked["p0"] > 3 * run.MAX_TRIES)
            assert (waiting.status, waiting.num_failed) == ("in_progress", 0)
            daemon.model.is_full = False
            record = await daemon.end(record.id)
            assert (record.status, record.num_completed, record.num_failed) == ("completed", 6, 0)

    asyncio.run(scenario())


def test_requests_that_wait_for_room_expire_with_their_batch(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(jobs, "COMPLETION_WINDOW_S", 1)
        async with daemon.running(window=4):
            daemon.model.is_full = True
            record = await daemon.end((await daemon.start(12)).id)
            answers, failures = daemon.results(record)
            assert (record.status, answers, len(failures)) == ("expired", {}, 12)
            assert {entry["error"]["code"] for entry in failures.values()} == {"batch_expired"}

    asyncio.run(scenario())


def test_requests_that_wait_for_room_are_cancelled(daemon: Daemon) -> None:
    async def scenario() -> None:
        daemon.model.is_full = True
        async with daemon.running(window=4):
            record = await daemon.start(12)
            await daemon.until(record.id, lambda _: daemon.model.asked["p0"] > 0)
            await daemon.jobs.cancel(record.id)
            record = await daemon.end(record.id)
            answers, failures = daemon.results(record)
            assert (record.status, answers, len(failures)) == ("cancelled", {}, 12)
            assert {entry["error"]["code"] for entry in failures.values()} == {"batch_cancelled"}

    asyncio.run(scenario())


def test_a_request_with_many_prompts_counts_as_many(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=7):
            record = await daemon.end((await daemon.start(4, model="tiny", prompt=["x", "y", "z"])).id)
            assert record.num_completed == 4
            assert daemon.model.most_in_flight == 2
            await daemon.end((await daemon.start(12, model="tiny", prompt=[1, 2, 3])).id)
            assert daemon.model.most_in_flight == 7

    asyncio.run(scenario())


def test_a_bad_file_fails_the_batch_and_runs_nothing(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running():
            record = await daemon.end((await daemon.start(3, model="nonesuch")).id)
            assert (record.status, [(error.code, error.line) for error in record.errors]) == (
                "failed",
                [("model_not_found", number) for number in (1, 2, 3)],
            )
            assert not daemon.model.asked
            output = daemon.files.publish(_write(daemon.files), filename="x", purpose="batch_output")
            with pytest.raises(RequestError, match="purpose"):
                await daemon.jobs.create(output.id, ENDPOINT, metadata=None, output_expires_after_s=None)

    asyncio.run(scenario())


def _write(files: FileStore) -> Path:
    path = files.new_partial()
    path.write_bytes(b"x")
    return path


def test_cancelling_keeps_answers_and_names_the_rest(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            daemon.model.num_before_pause = 5
            record = await daemon.start(30)
            await daemon.until(record.id, lambda record: record.num_completed == 5)
            assert (await daemon.jobs.cancel(record.id)).status == "cancelling"
            with contextlib.suppress(RequestError):  # a second time is no error while it lasts
                await daemon.jobs.cancel(record.id)
            record = await daemon.end(record.id)
            answers, failures = daemon.results(record)
            assert record.status == "cancelled"
            assert len(answers) == record.num_completed == 5
            assert len(answers) + len(failures) == 30
            assert {entry["error"]["code"] for entry in failures.values()} == {"batch_cancelled"}
            with pytest.raises(RequestError, match="can no longer"):
                await daemon.jobs.cancel(record.id)

    asyncio.run(scenario())


def test_answers_that_came_during_a_write_are_kept(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    append, has_begun, may_end = ResultLog.append, threading.Event(), threading.Event()

    def append_slowly(self: ResultLog, results: Sequence[Result]) -> None:
        has_begun.set()
        may_end.wait(20)
        append(self, results)

    monkeypatch.setattr(ResultLog, "append", append_slowly)

    async def scenario() -> None:
        async with daemon.running(window=4):
            daemon.model.num_before_pause = 1
            record = await daemon.start(10, model="tiny")
            await asyncio.to_thread(has_begun.wait, 20)
            daemon.model.gate.set()
            await daemon.until(record.id, lambda _: daemon.model.num_in_flight == 0)
            await daemon.jobs.cancel(record.id)
            may_end.set()
            record = await daemon.end(record.id)
            answers, failures = daemon.results(record)
            assert (record.status, len(answers), len(failures)) == ("cancelled", 4, 6)

    asyncio.run(scenario())


def test_records_are_written_one_after_the_other(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saving, has_begun = BatchStore.save, list[str](), threading.Event()

    def save_slowly(self: BatchStore, record: BatchRecord) -> None:
        saving.append(record.status)
        assert len(saving) == 1, "two writes of one record at once"
        if record.status == "in_progress":
            has_begun.set()
            threading.Event().wait(0.1)
        save(self, record)
        saving.clear()

    monkeypatch.setattr(BatchStore, "save", save_slowly)

    async def scenario() -> None:
        async with daemon.running():
            record = await daemon.start(3)
            await asyncio.to_thread(has_begun.wait)
            assert (await daemon.jobs.cancel(record.id)).status == "cancelling"
            record = await daemon.end(record.id)
            assert (record.status, record.errors) == ("cancelled", [])

    asyncio.run(scenario())


def test_a_batch_whose_client_left_while_it_was_made_runs(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    save, has_begun = BatchStore.save, threading.Event()

    def save_slowly(self: BatchStore, record: BatchRecord) -> None:
        has_begun.set()
        threading.Event().wait(0.05)
        save(self, record)

    monkeypatch.setattr(BatchStore, "save", save_slowly)

    async def scenario() -> None:
        async with daemon.running():
            request = asyncio.create_task(daemon.start(3))
            await asyncio.to_thread(has_begun.wait)
            request.cancel()
            await asyncio.wait({request})
            assert request.cancelled()
            (record,) = daemon.jobs.list()
            assert (await daemon.end(record.id)).status == "completed"

    asyncio.run(scenario())


def test_a_batch_that_waits_for_its_turn_is_cancelled_at_once(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running():
            daemon.model.gate.clear()
            first, second, third = [await daemon.start(3) for _ in range(3)]
            await daemon.until(first.id, lambda record: record.status == "in_progress")
            await daemon.jobs.cancel(second.id)
            assert (await daemon.end(second.id)).status == "cancelled"
            assert daemon.jobs.get(first.id).status == "in_progress"
            daemon.model.gate.set()
            assert [(await daemon.end(record.id)).status for record in (first, third)] == ["completed"] * 2

    asyncio.run(scenario())


def test_a_daemon_that_stops_half_way_leaves_the_rest_to_the_next(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.start_and_pause()
        daemon.model.gate.set()
        done = dict(daemon.model.asked)
        async with daemon.running(window=4):
            record = await daemon.end(record.id)
            answers, failures = daemon.results(record)
            assert (record.status, record.num_completed, len(answers), failures) == ("completed", 50, 50, {})
        repeated = [prompt for prompt, count in daemon.model.asked.items() if count > 1]
        assert len(repeated) <= 4, "only what was in flight"
        assert set(repeated) <= set(done)

    asyncio.run(scenario())


def test_counts_of_an_interrupted_batch_are_never_less_than_they_were(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.start_and_pause()
        async with daemon.running(window=4):
            assert daemon.jobs.get(record.id).num_completed == 10, "as soon as anybody can ask"
            await daemon.jobs.cancel(record.id)
            await daemon.end(record.id)

    asyncio.run(scenario())


def test_a_model_that_goes_while_a_batch_runs_costs_its_own_requests_only(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.start_and_pause()
        daemon.model.gate.set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(MODELS, "plain", False)
            daemon.model.failures = {f"p{n}": [ModelNotFound("gone")] for n in range(1, 50, 2)}
            async with daemon.running(window=4):
                record = await daemon.end(record.id)
        assert (record.status, record.num_completed, record.num_failed) == ("completed", 25, 25)

    asyncio.run(scenario())


def test_a_disk_that_refuses_the_end_of_a_batch_delays_it(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    save, num_refused = BatchStore.save, 0

    def refuse_thrice(self: BatchStore, record: BatchRecord) -> None:
        nonlocal num_refused
        if record.is_final and num_refused < 3:
            num_refused += 1
            raise StoreError("no room")
        save(self, record)

    monkeypatch.setattr(BatchStore, "save", refuse_thrice)

    async def scenario() -> None:
        async with daemon.running():
            record = await daemon.end((await daemon.start(3, model="nonesuch")).id)
            assert (record.status, num_refused) == ("failed", 3)

    asyncio.run(scenario())


async def assert_ends_after_a_restart(daemon: Daemon, batch_id: str, num_lines: int) -> None:
    """All lines are answered, and none was asked twice."""
    async with daemon.running():
        record = await daemon.end(batch_id)
        assert (record.status, len(daemon.results(record)[0])) == ("completed", num_lines)
    assert set(daemon.model.asked.values()) == {1}


def test_a_crash_while_results_are_published_publishes_them_again(daemon: Daemon) -> None:
    async def scenario() -> None:
        publish, num_published = FileStore.publish, 0

        def publish_and_stop(self: FileStore, *args: object, **options: object):
            nonlocal num_published
            record = publish(self, *args, **options)  # pyright: ignore
            if options.get("file_id"):
                num_published += 1
                raise StoreError("the disk hangs after the file was moved")
            return record

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FileStore, "publish", publish_and_stop)
            patch.setattr(jobs, "RETRY_DISK_S", 1000.0)
            async with daemon.running():
                record = await daemon.start(6)
                while not num_published:
                    await asyncio.sleep(0.001)
        assert daemon.jobs.get(record.id).status == "finalizing"
        await assert_ends_after_a_restart(daemon, record.id, 6)

    asyncio.run(scenario())


def test_nothing_is_published_before_the_end_is_durable(daemon: Daemon) -> None:
    async def scenario() -> None:
        save, num_refused = BatchStore.save, 0

        def refuse_outcomes(self: BatchStore, record: BatchRecord) -> None:
            nonlocal num_refused
            if record.outcome is not None:
                num_refused += 1
                raise StoreError("no room")
            save(self, record)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchStore, "save", refuse_outcomes)
            async with daemon.running():
                record = await daemon.start(6)
                await daemon.until(record.id, lambda _: num_refused == 3)
        await assert_ends_after_a_restart(daemon, record.id, 6)

    asyncio.run(scenario())


def test_published_results_stay_until_their_batch_has_ended(daemon: Daemon) -> None:
    async def scenario() -> None:
        save, is_refused = BatchStore.save, True

        def refuse_ends(self: BatchStore, record: BatchRecord) -> None:
            if record.is_final and is_refused:
                raise StoreError("no room")
            save(self, record)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchStore, "save", refuse_ends)
            async with daemon.running():
                record = await daemon.start(4, output_expires_after_s=3600)
                while not (published := [file for file in daemon.files.list() if file.purpose == "batch_output"]):
                    await asyncio.sleep(0.001)
                with pytest.raises(RequestError, match=record.id):
                    daemon.jobs.check_unused(published[0].id)
        daemon.now_s += 7200
        async with daemon.running():
            record = await daemon.end(record.id)
            assert (record.status, record.output_file_id) == ("completed", published[0].id)
            daemon.jobs.check_unused(published[0].id)

    asyncio.run(scenario())


def test_the_window_of_a_day_ends_a_batch_also_across_a_restart(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            daemon.model.num_before_pause = 4
            record = await daemon.start(20)
            await daemon.until(record.id, lambda record: record.num_completed == 4)
        daemon.now_s += jobs.COMPLETION_WINDOW_S
        async with daemon.running(window=4):
            record = await daemon.end(record.id)
            answers, failures = daemon.results(record)
            assert record.status == "expired"
            assert len(answers) + len(failures) == 20
            assert {entry["error"]["code"] for entry in failures.values()} == {"batch_expired"}

    asyncio.run(scenario())


def test_a_full_disk_delays_a_batch_and_loses_nothing(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    append, num_calls = ResultLog.append, 0

    def fail_every_third(self: ResultLog, results: object) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls % 3 == 0:
            raise StoreError("no room")
        append(self, results)  # pyright: ignore

    monkeypatch.setattr(ResultLog, "append", fail_every_third)

    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.end((await daemon.start(20)).id)
            assert (record.status, len(daemon.results(record)[0])) == ("completed", 20)

    asyncio.run(scenario())


def test_an_input_file_is_kept_while_it_is_read(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running():
            daemon.model.gate.clear()
            record = await daemon.start(2)
            with pytest.raises(RequestError, match=record.id):
                daemon.jobs.check_unused(record.input_file_id)
            daemon.model.gate.set()
            await daemon.end(record.id)
            daemon.jobs.check_unused(record.input_file_id)

    asyncio.run(scenario())


def test_an_input_whose_time_is_over_is_kept_until_its_batch_ends(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            daemon.model.num_before_pause = 10
            path = daemon.files.new_partial()
            fields = {"method": "POST", "url": ENDPOINT}
            lines = [fields | {"custom_id": f"id-{n}", "body": {"model": "tiny", "prompt": f"p{n}"}} for n in range(20)]
            path.write_text("\n".join(map(json.dumps, lines)))
            file = daemon.files.publish(path, filename="in.jsonl", purpose="batch", expires_after_s=3600)
            record = await daemon.jobs.create(file.id, ENDPOINT, metadata=None, output_expires_after_s=None)
            await daemon.until(record.id, lambda record: record.num_completed == 10)
            daemon.now_s += 7200
            daemon.files.remove_expired()
        async with daemon.running(window=4):
            daemon.model.gate.set()
            record = await daemon.end(record.id)
            assert (record.status, record.num_completed) == ("completed", 20)
            await asyncio.sleep(0)
            with pytest.raises(ObjectNotFound):
                daemon.files.get(file.id)

    asyncio.run(scenario())


def test_an_input_that_vanished_fails_the_batch(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running():
            daemon.model.gate.clear()
            record = await daemon.start(2)
            await daemon.until(record.id, lambda record: record.status == "in_progress")
        daemon.model.gate.set()
        (daemon.folder / "files" / f"{record.input_file_id}.json").unlink()
        async with daemon.running():
            record = await daemon.end(record.id)
            assert (record.status, record.errors[0].code) == ("failed", "object_not_found")
        assert set((daemon.folder / "batches").iterdir()) == {daemon.folder / "batches" / f"{record.id}.json"}

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["cancel", "cancel and restart", "expiry"])
def test_a_batch_whose_input_cannot_be_read_ends_when_it_has_to(daemon: Daemon, end: str) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.start_and_pause()
        (daemon.folder / "files" / f"{record.input_file_id}.data").unlink()
        async with daemon.running(window=4):
            await asyncio.sleep(0.05)
            assert not daemon.jobs.get(record.id).is_final, "the disk may come back"
            if end == "cancel":
                await daemon.jobs.cancel(record.id)
                await daemon.end(record.id)
        if end == "cancel and restart":
            path = daemon.folder / "batches" / f"{record.id}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "cancelling", "cancelling_at": 1}))
        if end == "expiry":
            daemon.now_s += jobs.COMPLETION_WINDOW_S
        async with daemon.running(window=4):
            record = await daemon.end(record.id)
            assert (record.status, [error.code for error in record.errors]) == ("failed", ["store_error"])
            assert (record.num_total, record.num_completed, record.num_failed) == (50, 10, 0)
            assert len(daemon.results(record)[0]) == 10
        assert set((daemon.folder / "batches").iterdir()) == {daemon.folder / "batches" / f"{record.id}.json"}

    asyncio.run(scenario())


def test_an_input_that_vanished_leaves_the_answers_it_has(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.start_and_pause()
        (daemon.folder / "files" / f"{record.input_file_id}.json").unlink()
        async with daemon.running(window=4):
            record = await daemon.end(record.id)
            assert (record.status, len(daemon.results(record)[0])) == ("failed", 10)

    asyncio.run(scenario())


def test_lines_are_read_in_threads(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    has, threads = ResultLog.has, Counter[threading.Thread]()

    def note_thread(self: ResultLog, custom_id: str) -> bool:
        threads[threading.current_thread()] += 1
        return has(self, custom_id)

    monkeypatch.setattr(ResultLog, "has", note_thread)

    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.start_and_pause()
        async with daemon.running(window=4):
            await daemon.until(record.id, lambda _: daemon.model.num_in_flight == 4)
            await daemon.jobs.cancel(record.id)
            assert (await daemon.end(record.id)).status == "cancelled"
        assert sum(threads.values()) == 3 * 50, "two runs, and the refusal of the rest"
        assert threading.main_thread() not in threads

    asyncio.run(scenario())


def test_inputs_are_checked_one_at_a_time(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    check, is_busy = InputChecker.check, threading.Lock()

    def check_slowly(self: InputChecker, path: Path) -> BatchInput | None:
        assert is_busy.acquire(blocking=False), "threads that check would be missing elsewhere"
        threading.Event().wait(0.02)
        is_busy.release()
        return check(self, path)

    monkeypatch.setattr(InputChecker, "check", check_slowly)

    async def scenario() -> None:
        async with daemon.running():
            records = [await daemon.start(2) for _ in range(8)]
            assert {(await daemon.end(record.id)).status for record in records} == {"completed"}

    asyncio.run(scenario())


def test_the_batch_that_ran_goes_on_first_after_a_restart(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            first = await daemon.start_and_pause()
            others = [await daemon.start(2) for _ in range(12)]
        async with daemon.running(window=4):
            await daemon.until(first.id, lambda _: daemon.model.num_in_flight == 4)
            assert {daemon.jobs.get(record.id).status for record in others} == {"validating"}
            daemon.model.gate.set()
            for record in [first, *others]:
                assert (await daemon.end(record.id)).status == "completed"

    asyncio.run(scenario())


def test_batches_of_one_second_run_in_their_order_after_a_restart(daemon: Daemon) -> None:
    async def scenario() -> None:
        prompts = [f"of batch {number}" for number in range(10)]
        daemon.model.gate.clear()
        async with daemon.running():
            records: list[BatchRecord] = []
            for prompt in prompts:
                records.append(await daemon.start(1, prompt=prompt))
                daemon.now_s += 0.01
            assert {record.created_at for record in records} == {1_000_000}
        async with daemon.running():
            assert [record.id for record in daemon.jobs.list()] == [record.id for record in reversed(records)]
            daemon.model.gate.set()
            for record in records:
                await daemon.end(record.id)
            assert list(daemon.model.asked) == prompts

    asyncio.run(scenario())


def test_a_batch_that_waits_for_its_turn_has_no_file_open(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            daemon.model.gate.clear()
            records = [await daemon.start(3) for _ in range(30)]
            for record in records:
                await daemon.until(record.id, lambda record: record.num_total == 3)
            await daemon.until(records[0].id, lambda _: daemon.model.num_in_flight == 3)
            opened = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
            assert sum(str(daemon.folder) in path for path in opened) <= 3
            daemon.model.gate.set()
            assert {(await daemon.end(record.id)).status for record in records} == {"completed"}

    asyncio.run(scenario())


def test_results_that_cannot_be_read_do_not_keep_a_daemon_from_starting(daemon: Daemon) -> None:
    async def scenario() -> None:
        async with daemon.running(window=4):
            record = await daemon.start_and_pause()
        path = daemon.folder / "batches" / f"{record.id}.output.jsonl"
        path.rename(path.with_suffix(".away"))
        path.mkdir()
        daemon.model.gate.set()
        async with daemon.running(window=4):
            path.rmdir()
            path.with_suffix(".away").rename(path)
            record = await daemon.end(record.id)
            assert (record.status, len(daemon.results(record)[0])) == ("completed", 50)

    asyncio.run(scenario())


def test_memory_does_not_grow_with_the_number_of_requests(daemon: Daemon) -> None:
    async def peak_bytes(num_lines: int) -> int:
        record = await daemon.start(num_lines)
        tracemalloc.start()
        await daemon.end(record.id)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    async def scenario() -> None:
        async with daemon.running(window=16):
            daemon.model.asked = Counter()
            await peak_bytes(50)
            small, large = await peak_bytes(100), await peak_bytes(1500)
            # Two sets of digests and the model's own counter grow; lines, which are larger by far, do not.
            assert (large - small) / 1400 < 600

    asyncio.run(scenario())
