"""Very many requests through a small window, against a worker that ends them in an order of its own."""

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from flashtensors.errors import FlashError, RequestError, WorkerError
from flashtensors.request import EngineRequest, RequestOutput, SamplingParams, SequenceDelta
from flashtensors.testing.checkpoints import write_tiny_tokenizer
from flashtensors.text.tokenizer import Tokenizer
from flashtensors.worker import prompt_feed
from flashtensors.worker.batch_progress import BatchCounts, show_progress
from flashtensors.worker.embedded import Listener
from flashtensors.worker.outputs import OutputBuilder
from flashtensors.worker.prompt_feed import to_token_ids, tokenize_ahead, zip_sampling
from flashtensors.worker.prompt_window import OnDelta, run_ordered
from flashtensors.worker.stats import ModelStats, Stats

NUM_RUNNING, NUM_HELD = 4, 10


class AnswerByAnswer:
    """Runs four answers at once, first come first; which of these ends next is drawn."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._open: list[tuple[str, int]] = []
        self._listeners: dict[str, Listener] = {}
        self.most_open = 0
        self.fewest_open = 1000
        """While there were more prompts."""

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        self._listeners[request.request_id] = listener
        self._open += [(request.request_id, index) for index in range(request.sampling.n)]
        self.most_open = max(self.most_open, len(self._open))

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        pass

    def end_one(self, *, has_more: bool) -> None:
        if has_more:
            self.fewest_open = min(self.fewest_open, len(self._open))
        request_id, index = self._open.pop(self._draw.randrange(min(4, len(self._open))))
        delta = SequenceDelta(request_id=request_id, index=index, token_ids=[5], finish_reason="length")
        self._listeners[request_id](delta)


class ShuffledWorker:
    """Ends requests in random order, at once when as many run as may, else when the feed pauses."""

    def __init__(self, seed: int, most: int = NUM_RUNNING) -> None:
        self._draw, self._most = random.Random(seed), most
        self._open: dict[str, tuple[EngineRequest, Callable[[SequenceDelta | FlashError], None]]] = {}
        self.most_open, self.aborted = 0, set[str]()
        self.fails_at: str | None = None

    def submit(self, request: EngineRequest, listener: Callable[[SequenceDelta | FlashError], None]) -> None:
        self._open[request.request_id] = (request, listener)
        self.most_open = max(self.most_open, len(self._open))
        while self._open and (len(self._open) == self._most or self._draw.random() < 0.6):
            self._end(self._draw.choice(list(self._open)))

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        self.aborted.add(request_id)
        self._open.pop(request_id, None)

    def _end(self, request_id: str) -> None:
        request, listener = self._open.pop(request_id)
        if request_id == self.fails_at:
            listener(WorkerError("died"))
            return
        token_ids = list(request.prompt_token_ids)
        listener(SequenceDelta(request_id=request_id, index=0, token_ids=token_ids, finish_reason="length"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Feed:
    """Requests `0`, `1`, …; counts how many were drawn."""

    def __init__(self, tokenizer: Tokenizer, count: int, sampling: SamplingParams | None = None) -> None:
        self.num_drawn = 0
        self._tokenizer, self._count = tokenizer, count
        self._sampling = sampling or SamplingParams()

    def builders(self) -> Iterator[OutputBuilder]:
        for number in range(self._count):
            self.num_drawn += 1
            request = EngineRequest(
                request_id=f"{number}", model="m", prompt_token_ids=[40 + number % 200], sampling=self._sampling
            )
            yield OutputBuilder(request, None, self._tokenizer)


def run(worker: ShuffledWorker, feed: Feed, **bounds: int) -> Iterator[RequestOutput]:
    bounds = {"num_running": NUM_RUNNING, "num_held": NUM_HELD} | bounds
    return run_ordered(worker, feed.builders(), **bounds)  # pyright: ignore


def drain(worker: ShuffledWorker) -> None:
    for request_id in list(worker._open):
        worker._end(request_id)


@pytest.mark.parametrize("seed", range(20))
def test_outputs_come_in_order_and_only_a_window_is_drawn(tokenizer: Tokenizer, seed: int) -> None:
    worker, feed = ShuffledWorker(seed, most=1 + seed % NUM_RUNNING), Feed(tokenizer, 300 + seed)
    found: list[str] = []
    outputs = run(worker, feed, num_running=1 + seed % NUM_RUNNING)
    # The last ones have nobody behind them who makes the worker end them.
    for output in _with_a_push(outputs, worker, feed, 300 + seed):
        found.append(output.request_id)
        assert output.outputs[0].token_ids == output.prompt_token_ids
        assert feed.num_drawn - len(found) <= NUM_HELD
    assert found == [f"{number}" for number in range(300 + seed)]
    assert worker.most_open <= NUM_RUNNING


def _with_a_push(
    outputs: Iterator[RequestOutput], worker: ShuffledWorker, feed: Feed, count: int
) -> Iterator[RequestOutput]:
    submit = worker.submit

    def submit_and_push(request: EngineRequest, listener: Callable[[SequenceDelta | FlashError], None]) -> None:
        submit(request, listener)
        if feed.num_drawn == count or len(worker._open) < worker._most:
            drain(worker)

    worker.submit = submit_and_push
    return outputs


@pytest.mark.parametrize("num_answers", [1, 3, 8, 128])
def test_the_window_counts_answers_and_not_requests(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, num_answers: int
) -> None:
    worker, feed = AnswerByAnswer(num_answers), Feed(tokenizer, 40, SamplingParams(n=num_answers))

    class PushedQueue(queue.SimpleQueue[object]):
        """Lets an answer end when somebody waits for one."""

        def get(self, block: bool = True, timeout: float | None = None) -> object:
            if self.empty():
                worker.end_one(has_more=feed.num_drawn < 40)
            return super().get(block, timeout)

    monkeypatch.setattr(queue, "SimpleQueue", PushedQueue)
    outputs = run_ordered(worker, feed.builders(), num_running=16, num_held=32)  # pyright: ignore
    num_unread: list[int] = []
    for output in outputs:
        assert output.request_id == f"{len(num_unread)}"
        num_unread.append(feed.num_drawn - len(num_unread))
    assert len(num_unread) == 40
    assert max(num_unread) <= max(2, 1 + 31 // num_answers)
    assert worker.most_open < 16 + num_answers
    assert worker.fewest_open >= 4, "the worker ran dry"


def test_deltas_are_told_before_their_turn(tokenizer: Tokenizer) -> None:
    worker, feed = ShuffledWorker(5), Feed(tokenizer, 100)
    told: list[str] = []

    def note(builder: OutputBuilder, delta: SequenceDelta) -> None:
        assert builder.is_finished
        told.append(delta.request_id)

    outputs = run_ordered(
        worker,  # pyright: ignore[reportArgumentType]
        feed.builders(),
        num_running=NUM_RUNNING,
        num_held=NUM_HELD,
        on_delta=note,
    )
    num_ahead = [len(told) - position for position, _ in enumerate(_with_a_push(outputs, worker, feed, 100), 1)]
    assert sorted(told, key=int) == [f"{number}" for number in range(100)]
    assert max(num_ahead) > 1


def test_an_error_stops_the_rest(tokenizer: Tokenizer) -> None:
    worker, feed = ShuffledWorker(1), Feed(tokenizer, 100)
    worker.fails_at = "9"
    with pytest.raises(WorkerError):
        list(_with_a_push(run(worker, feed), worker, feed, 100))
    assert not worker._open
    assert feed.num_drawn < 100


def test_closing_stops_what_runs(tokenizer: Tokenizer) -> None:
    worker, feed = ShuffledWorker(2), Feed(tokenizer, 100)
    outputs = _with_a_push(run(worker, feed), worker, feed, 100)
    next(outputs)
    outputs.close()  # pyright: ignore
    assert not worker._open


def test_prompts_are_tokenised_as_one_by_one_and_a_bounded_way_ahead(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_feed, "MAX_CHUNK", 32)
    num_drawn = 0

    def prompts() -> Iterator[str | list[int]]:
        nonlocal num_drawn
        for number in range(500):
            num_drawn += 1
            yield [5, number] if number % 7 == 0 else f"prompt {number}, äöü"

    num_seen = 0
    params = [SamplingParams(max_tokens=number + 1) for number in range(500)]
    for text, token_ids, sampling in tokenize_ahead(
        zip_sampling(prompts(), iter(params)), tokenizer, adds_special_tokens=True
    ):
        expected = f"prompt {num_seen}, äöü"
        assert (text, token_ids) == (
            (None, [5, num_seen]) if num_seen % 7 == 0 else (expected, tokenizer.encode(expected))
        )
        assert sampling.max_tokens == num_seen + 1
        num_seen += 1
        assert num_drawn - num_seen <= 64
    assert num_seen == 500


@pytest.mark.parametrize(
    ("num_params", "match"), [(2, "2 sampling_params for more"), (4, "more sampling_params for 3")]
)
def test_parameters_that_run_out_or_are_left_over_are_an_error(num_params: int, match: str) -> None:
    params = (SamplingParams() for _ in range(num_params))
    with pytest.raises(RequestError, match=match):
        list(zip_sampling(iter("abc"), params))
    with pytest.raises(RequestError, match=f"{num_params} sampling_params for 3"):
        zip_sampling(["a", "b", "c"], [SamplingParams()] * num_params)


def test_text_that_is_not_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        list(tokenize_ahead(zip_sampling(["a", "\ud800"], None), tokenizer, adds_special_tokens=True))


@pytest.mark.parametrize("prompt", [range(5, 8), (5, 6, 7), np.array([5, 6, 7]), [np.int32(5), 6, np.int64(7)]])
def test_any_sequence_of_ints_is_a_prompt(prompt: Sequence[int]) -> None:
    token_ids = to_token_ids(prompt)
    assert token_ids == [5, 6, 7]
    assert {type(token_id) for token_id in token_ids} == {int}


def report(kv_usage: float = 0.0, num_generated: int = 0, at_s: float = 0.0) -> Stats:
    model = ModelStats(
        model="m",
        num_running=1,
        num_waiting=0,
        kv_usage=kv_usage,
        weight_bytes=0,
        kv_cache_bytes=0,
        expires_in_s=None,
        is_pinned=True,
        num_preemptions=0,
        prefix_queries=0,
        prefix_hits=0,
        num_generated=num_generated,
    )
    return Stats(models=[model], loading=[], free_bytes=0, at_s=at_s)


class Progressing:
    """Three prompts of ten tokens whose answers end last first, and the bar over them, at a time that is told."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.stats = report(num_generated=5000, at_s=60.0)  # of what ran before
        self.now_s = 100.0
        self._builders = [
            OutputBuilder(
                EngineRequest(
                    request_id=f"{number}", model="m", prompt_token_ids=[7] * 10, sampling=SamplingParams(n=2)
                ),
                None,
                tokenizer,
            )
            for number in range(3)
        ]

    def advance(self, advance: OnDelta, number: int, index: int, num_tokens: int, num_cached_tokens: int) -> None:
        builder = self._builders[number]
        delta = SequenceDelta(
            request_id=f"{number}",
            index=index,
            token_ids=[40] * num_tokens,
            finish_reason="length",
            num_cached_tokens=num_cached_tokens,
        )
        builder.push(delta)
        advance(builder, delta)


def test_the_bar_shows_what_has_ended_though_the_first_prompt_has_not(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    worker = Progressing(tokenizer)
    with show_progress(worker, "model", 3, clock=lambda: worker.now_s) as advance:  # pyright: ignore
        worker.advance(advance, 2, 0, 300, 4)
        worker.advance(advance, 2, 1, 200, 4)
        worker.advance(advance, 1, 0, 500, 0)
        worker.now_s, worker.stats = 104.0, report(0.37, num_generated=5000, at_s=100.0)
    assert "1/3 250 tok/s  KV 37%  prefix hits 40%" in capsys.readouterr().err


def test_tokens_count_before_their_answers_end(tokenizer: Tokenizer) -> None:
    worker = Progressing(tokenizer)
    counts, rates = BatchCounts(worker, lambda: worker.now_s), list[float]()  # pyright: ignore
    for now_s, num_generated in ((100.1, 5000), (101.0, 5900), (101.4, 5900), (105.0, 9900), (106.0, 9900)):
        worker.now_s = now_s + 0.3
        worker.stats = report(num_generated=num_generated, at_s=now_s)
        rates.append(round(counts.tokens_per_s()))
    assert rates == [0, 1000, 692, 1000, 831], "what was generated before is no part of it"
    worker.advance(counts.add, 0, 0, 6300, 0)
    counts.is_complete, worker.now_s = True, 106.3
    assert counts.tokens_per_s() == pytest.approx(1000), "to the last one"


def test_the_bar_is_drawn_again_though_nothing_ends(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "200")
    worker, shown = Progressing(tokenizer), ""
    with show_progress(worker, "model", 3, clock=lambda: worker.now_s) as advance:  # pyright: ignore
        worker.advance(advance, 2, 0, 300, 0)
        for now_s, expected in ((102.0, "150 tok/s"), (110.0, "30 tok/s")):
            worker.now_s = now_s
            for _ in range(500):
                if expected in (shown := shown + capsys.readouterr().err):
                    break
                threading.Event().wait(0.01)
            assert expected in shown
