"""The window of a batch, in front of an engine that says once a second what it runs."""

import dataclasses

import pytest

from flashtensors.config import Settings
from flashtensors.server.batches.window import QueueReport, Window, WindowLimits
from flashtensors.server.openai.batch_lines import window_limits

STEPS_PER_S = 20


@dataclasses.dataclass
class Engine:
    """Admits so many requests a step, runs each for so many steps, and reports once a second."""

    num_slots: int
    num_admitted: int
    num_steps: int
    is_loaded: bool = True
    num_waiting: int = 0
    num_chats: int = 0
    """Requests of others, which wait before ours and never run."""
    running: list[int] = dataclasses.field(default_factory=list)
    now_s: float = 1_000.0
    report: QueueReport = dataclasses.field(default_factory=lambda: QueueReport(at_s=0.0, num_waiting=0))

    def step(self) -> int:
        """Returns how many have ended."""
        self.now_s += 1 / STEPS_PER_S
        num_before = len(self.running)
        self.running = [left - 1 for left in self.running if left > 1]
        num_ended = num_before - len(self.running)
        num_new = min(self.num_admitted, self.num_waiting, self.num_slots - len(self.running)) if self.is_loaded else 0
        self.num_waiting -= num_new
        self.running += [self.num_steps] * num_new
        if self.now_s - self.report.at_s >= 1.0:
            self.report = QueueReport(at_s=self.now_s, num_waiting=self.num_waiting + self.num_chats)
        return num_ended


@dataclasses.dataclass
class Feed:
    """An endless batch."""

    engine: Engine
    limits: WindowLimits
    most_waiting: int = 0
    most_in_flight: int = 0

    def __post_init__(self) -> None:
        engine = self.engine
        self.window = Window(
            self.limits, lambda _: engine.report if engine.is_loaded else None, clock=lambda: engine.now_s
        )

    def run(self, seconds: float) -> list[int]:
        """Returns how many ran after each step."""
        num_running: list[int] = []
        for _ in range(int(seconds * STEPS_PER_S)):
            while self.window.has_room("m", 1):
                self.window.take("m", 1)
                self.engine.num_waiting += 1
            self.most_waiting = max(self.most_waiting, self.engine.num_waiting)
            self.most_in_flight = max(self.most_in_flight, self.engine.num_waiting + len(self.engine.running))
            for _ in range(self.engine.step()):
                self.window.give_back("m", 1)
            num_running.append(len(self.engine.running))
        return num_running


def feed(engine: Engine, **settings: int) -> Feed:
    return Feed(engine, window_limits(Settings(**{"max_num_seqs": engine.num_slots} | settings)))  # pyright: ignore


@pytest.mark.parametrize("num_slots", [1, 8, 256, 1024, 4096])
@pytest.mark.parametrize("num_steps", [20, 200])
def test_every_slot_is_busy_and_a_quarter_of_the_queue_free(num_slots: int, num_steps: int) -> None:
    batch = feed(
        Engine(num_slots=num_slots, num_admitted=2 * num_slots // num_steps + 1, num_steps=num_steps), max_queue=512
    )
    batch.run(60)
    num_busy = batch.run(20)
    num_wanted = num_slots if num_steps == 200 else min(num_slots, 450)  # reports are too seldom for shorter answers
    assert sum(num_busy) / len(num_busy) >= 0.98 * num_wanted
    assert batch.most_waiting <= 384
    assert batch.most_in_flight <= max(384, num_slots + 128)


@pytest.mark.parametrize("num_admitted", [0, 1, 5])
def test_an_engine_that_is_slow_to_begin_has_room_in_its_queue(num_admitted: int) -> None:
    batch = feed(Engine(num_slots=2048, num_admitted=num_admitted, num_steps=10_000), max_queue=512)
    batch.run(120)
    assert 100 <= batch.most_waiting <= 384


def test_a_model_that_is_not_on_the_device_gets_no_more_than_its_queue_holds() -> None:
    engine = Engine(num_slots=1024, num_admitted=50, num_steps=200)
    batch = feed(engine, max_queue=512)
    batch.run(30)
    engine.is_loaded = False
    engine.num_waiting, engine.running = engine.num_waiting + len(engine.running), []
    while batch.window.has_room("m", 1):
        batch.window.take("m", 1)
    engine.num_waiting, num_before = 0, engine.num_waiting
    for _ in range(num_before):
        batch.window.give_back("m", 1)
    batch.most_waiting = 0
    batch.run(5)
    assert batch.most_waiting == 384


def test_chats_that_wait_make_room_for_themselves() -> None:
    engine = Engine(num_slots=1024, num_admitted=50, num_steps=200)
    batch = feed(engine, max_queue=512)
    batch.run(30)
    engine.num_chats = 300
    batch.run(30)
    assert engine.num_waiting == 0


def test_all_models_share_one_bound_and_a_large_request_runs_alone() -> None:
    window = Window(WindowLimits(num_sure=4, num_most=6, num_spare=2), lambda _: None)
    assert window.has_room("a", 50)
    window.take("a", 4)
    assert not window.has_room("a", 1)
    assert window.has_room("b", 2)
    window.take("b", 2)
    assert not window.has_room("b", 1)
    window.give_back("a", 4)
    window.give_back("b", 2)
    window.take("b", 50)
    assert not window.has_room("a", 1)
