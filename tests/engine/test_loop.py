from __future__ import annotations

import dataclasses

import pytest

from flashtensors.engine.batch import FRESH_TOKENS, Batch
from flashtensors.engine.loop import Engine
from flashtensors.engine.sequence import SequenceState, make_sequences
from flashtensors.engine.turns import PRIORITY_STRIDE, Turns
from flashtensors.errors import CapacityError, RequestError
from flashtensors.request import SamplingParams
from flashtensors.step import StepResult
from flashtensors.testing.fake_runner import FakeRunner

from .traffic import NEVER_DRAWN, Traffic, limits, request

PROMPT = list(range(4, 30))


def test_an_idle_engine_has_nothing_to_do() -> None:
    traffic = Traffic(limits())
    assert not traffic.engine.has_work
    assert traffic.engine.step() == []
    assert traffic.runner.plans == []


def test_identical_prompts_of_one_burst_are_computed_once() -> None:
    traffic = Traffic(limits(max_tokens_per_step=64))
    traffic.add(request("a", PROMPT, n=3, max_tokens=4))
    traffic.add(request("b", PROMPT, max_tokens=4))
    deltas = traffic.step()
    assert traffic.runner.plans[0].spans[:, 2].tolist() == [26, 2, 2, 2]
    assert [delta.num_cached_tokens for delta in deltas] == [0, 24, 24, 24]
    stats = traffic.engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (4 * 26, 3 * 24)
    assert stats.kv_usage == (6 + 4) / 64
    traffic.drain()


def test_cached_tokens_are_reported_once_so_that_deltas_can_be_summed() -> None:
    traffic = Traffic(limits(num_blocks=14, max_tokens_per_step=64))
    traffic.expect_short_answers()
    traffic.add(request("a", PROMPT, n=3, max_tokens=20, ignore_eos=True, stop_token_ids=[NEVER_DRAWN]))
    deltas = []
    while traffic.engine.has_work:
        deltas += traffic.step()
    assert traffic.engine.stats().num_preemptions > 0
    totals = [sum(delta.num_cached_tokens for delta in deltas if delta.index == index) for index in range(3)]
    assert totals == [0, 24, 24]
    traffic.drain()


@pytest.mark.parametrize("depth", [1, 3])
def test_an_answer_can_be_continued_from_its_cache(depth: int) -> None:
    traffic = Traffic(limits(max_steps_in_flight=depth))
    traffic.add(request("a", PROMPT, max_tokens=19, ignore_eos=True))
    traffic.drain()
    traffic.add(request("b", [*PROMPT, *traffic.tokens["a", 0], 1, 2], max_tokens=1))
    (delta,) = traffic.step()
    assert delta.num_cached_tokens == 44  # of 45 tokens all but the last were computed
    traffic.drain()


def test_steps_are_filled_decodes_first() -> None:
    traffic = Traffic(limits(max_tokens_per_step=10))
    traffic.add(request("a", [1] * 8, max_tokens=9, ignore_eos=True))
    traffic.step()
    traffic.add(request("b", [2] * 25, max_tokens=2, ignore_eos=True))
    traffic.add(request("c", [1, 2, 4], max_tokens=2, ignore_eos=True))
    for _ in range(3):
        traffic.step()
    spans = [plan.spans[:, 2].tolist() for plan in traffic.runner.plans]
    assert spans == [[8], [1, 9], [1, 9], [1, 7, 2]]
    traffic.drain()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_steps_are_in_flight_as_may_be_and_no_token_is_drawn_past_the_end(depth: int) -> None:
    traffic = Traffic(limits(max_steps_in_flight=depth))
    traffic.add(request("a", PROMPT, max_tokens=6, ignore_eos=True))
    assert [len(delta.token_ids) for delta in traffic.step()] == [1]
    assert len(traffic.runner.plans) == depth
    traffic.drain()
    assert len(traffic.runner.plans) == 6


def test_the_youngest_gives_way_and_keeps_its_tokens() -> None:
    traffic = Traffic(limits(num_blocks=8, max_slots=2), enable_prefix_caching=False)
    traffic.expect_short_answers()
    for name, token_id in (("old", 1), ("young", 2)):
        traffic.add(request(name, [token_id] * 8, max_tokens=20, ignore_eos=True, stop_token_ids=[NEVER_DRAWN]))
    while traffic.engine.stats().num_preemptions == 0:
        traffic.step()
    kept = traffic.tokens["young", 0].copy()
    assert len(kept) > 1
    assert [s.request_id for s in traffic.engine.scheduler.waiting] == ["young"]
    traffic.drain()
    restart = traffic.runner.plans[-1 - 20 :]
    starts = [start for plan in restart for start in plan.starts]
    assert [(start.num_prompt_tokens, start.token_ids) for start in starts] == [(8, [2] * 8 + kept)]


@pytest.mark.parametrize(("max_tokens", "admitted"), [(8, ["first", "newcomer"]), (9, ["first"])])
def test_a_newcomer_leaves_those_who_run_what_they_will_need(max_tokens: int, admitted: list[str]) -> None:
    traffic = Traffic(limits(num_blocks=7), enable_prefix_caching=False)
    traffic.add(request("first", [1] * 8, max_tokens=9, ignore_eos=True))  # 2 blocks now, 4 for its 16th token
    traffic.add(request("newcomer", [2] * 5, max_tokens=max_tokens, ignore_eos=True))  # 3 blocks for its 12th
    assert [delta.request_id for delta in traffic.step()] == admitted
    traffic.drain()


def test_a_prompt_counts_once_in_the_statistics_however_often_it_is_recomputed() -> None:
    traffic = Traffic(limits(num_blocks=8, max_slots=2))
    traffic.expect_short_answers()
    for name in ("old", "young"):
        prompt = [1 + len(name)] * 8
        traffic.add(request(name, prompt, max_tokens=20, ignore_eos=True, stop_token_ids=[NEVER_DRAWN]))
    traffic.drain()
    stats = traffic.engine.stats()
    assert stats.num_preemptions > 0
    assert (stats.prefix_queries, stats.prefix_hits) == (16, 0)


def test_a_better_priority_goes_before_the_rest_of_a_long_prompt() -> None:
    traffic = Traffic(limits(max_tokens_per_step=10))
    traffic.add(request("batch", [1] * 50, max_tokens=1, priority=1))
    traffic.step()
    traffic.add(request("interactive", [2] * 8, max_tokens=1))
    assert [delta.request_id for delta in traffic.step()] == ["interactive"]
    assert traffic.runner.plans[1].spans[:, 2].tolist() == [8, 2]
    traffic.drain()


def test_a_stop_token_is_part_of_the_answer_and_named() -> None:
    traffic = Traffic(limits())
    traffic.add(request("free", PROMPT, max_tokens=8, ignore_eos=True))
    traffic.drain()
    third = traffic.tokens["free", 0][2]
    traffic.add(request("stopped", PROMPT, max_tokens=8, ignore_eos=True, stop_token_ids=[third]))
    deltas = []
    while traffic.engine.has_work:
        deltas += traffic.step()
    assert (deltas[-1].token_ids, deltas[-1].finish_reason, deltas[-1].stop_token_id) == ([third], "stop", third)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_an_abort_ends_every_answer_once_and_frees_everything(depth: int, num_steps: int) -> None:
    traffic = Traffic(limits(max_slots=2, max_tokens_per_step=16, max_steps_in_flight=depth))
    traffic.add(request("a", PROMPT, n=3, max_tokens=50, ignore_eos=True))
    for _ in range(num_steps):
        traffic.step()
    traffic.abort("a")
    traffic.abort("a")
    assert traffic.engine.stats().kv_usage == 0
    assert [(d.index, d.token_ids, d.finish_reason) for d in traffic.step()] == [(i, [], "abort") for i in range(3)]
    traffic.drain()


def test_one_answer_of_several_can_be_aborted_with_a_reason() -> None:
    traffic = Traffic(limits())
    traffic.add(request("a", PROMPT, n=2, max_tokens=5, ignore_eos=True))
    traffic.step()
    traffic.abort("a", 1, "stop")
    traffic.drain()
    assert traffic.reasons == {("a", 0): "length", ("a", 1): "stop"}


def test_unknown_requests_and_answers_are_not_aborted() -> None:
    traffic = Traffic(limits())
    traffic.engine.abort("nobody")
    traffic.add(request("a", PROMPT, max_tokens=2))
    traffic.abort("a", index=5)
    traffic.drain()
    traffic.engine.abort("a")
    assert not traffic.engine.has_work


@pytest.mark.parametrize("is_streamed", [False, True])
def test_long_answers_outgrow_the_tokens_that_a_slot_holds(is_streamed: bool) -> None:
    num_tokens = FRESH_TOKENS + 70
    traffic = Traffic(limits(num_blocks=400, max_model_len=700), stream_interval_s=1000.0)
    for name, skew in (("a", 0), ("b", 5)):
        asked = request(name, PROMPT, max_tokens=num_tokens + skew, ignore_eos=True, is_streamed=is_streamed)
        traffic.add(asked)
        traffic.step()
    traffic.drain()


def test_a_full_queue_refuses_and_says_so() -> None:
    traffic = Traffic(limits(max_slots=1), max_queue=2)
    traffic.add(request("a", PROMPT, n=2))
    with pytest.raises(CapacityError) as caught:
        traffic.add(request("b", PROMPT))
    assert caught.value.message == "2 answers wait for model 'fake', and at most 2 may; try later"
    assert caught.value.http_status == 503
    traffic.step()
    traffic.add(request("b", PROMPT))
    traffic.drain()


def test_a_queue_full_of_batch_work_takes_chats_and_no_more_of_them_than_it_would_else() -> None:
    traffic = Traffic(limits(max_slots=1), max_queue=2)
    traffic.add(request("running", PROMPT))
    traffic.step()
    for name in ("b0", "b1"):
        traffic.add(request(name, PROMPT, priority=1))
    with pytest.raises(CapacityError):
        traffic.add(request("b2", PROMPT, priority=1))
    for name in ("c0", "c1"):
        traffic.add(request(name, PROMPT))
    for priority in (0, 1):
        with pytest.raises(CapacityError):
            traffic.add(request("late", PROMPT, priority=priority))
    traffic.drain()


def test_chats_that_fill_the_queue_leave_batch_work_no_room() -> None:
    traffic = Traffic(limits(max_slots=1), max_queue=2)
    traffic.add(request("running", PROMPT))
    traffic.step()
    for name in ("c0", "c1"):
        traffic.add(request(name, PROMPT))
    with pytest.raises(CapacityError, match="2 answers wait"):
        traffic.add(request("b", PROMPT, priority=1))
    traffic.drain()


def test_an_id_in_use_is_refused_until_its_request_ends() -> None:
    traffic = Traffic(limits())
    traffic.add(request("a", PROMPT))
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        traffic.engine.add(request("a", PROMPT), [])
    traffic.drain()
    traffic.engine.add(request("a", PROMPT), [])


def test_requests_without_a_seed_get_different_ones_and_those_with_keep_theirs() -> None:
    traffic = Traffic(limits())
    for name, seed in (("a", None), ("b", None), ("c", 7), ("d", 7)):
        traffic.engine.add(request(name, PROMPT, seed=seed), [])
    traffic.engine.step()
    a, b, c, d = (start.seed for start in traffic.runner.plans[0].starts)
    assert len({a, b, c}) == 3
    assert c == d


def test_nobody_is_overtaken_for_ever() -> None:
    traffic = Traffic(limits(max_slots=1))
    traffic.add(request("running", [1, 2], max_tokens=1))
    traffic.add(request("batch", [1, 2], max_tokens=1, priority=1))
    num_overtaking = -1  # the request that was there first does not overtake
    while ("batch", 0) not in traffic.reasons:
        traffic.add(request(f"later{num_overtaking}", [1, 2], max_tokens=1))
        num_overtaking += sum(delta.request_id != "batch" for delta in traffic.step())
    assert PRIORITY_STRIDE - 10 < num_overtaking < PRIORITY_STRIDE
    traffic.drain()


def test_a_long_prompt_is_not_passed_by_short_ones_behind_it() -> None:
    traffic = Traffic(limits(num_blocks=16), enable_prefix_caching=False)
    traffic.add(request("first", [1] * 30, max_tokens=30, ignore_eos=True))
    traffic.step()
    traffic.add(request("long", [2] * 50, max_tokens=2))
    order = []
    for number in range(60):
        traffic.add(request(f"short{number}", [3], max_tokens=1))
        order += [delta.request_id for delta in traffic.step() if delta.finish_reason]
    assert order.index("long") < order.index("short0")
    traffic.drain()


def test_sampling_reaches_the_runner_unchanged() -> None:
    traffic = Traffic(limits())
    sampling = SamplingParams(temperature=0.5, top_p=0.9, seed=1, logit_bias={3: 1.0})
    wanted = request("a", PROMPT)
    traffic.engine.add(type(wanted)(request_id="a", model="m", prompt_token_ids=PROMPT, sampling=sampling), [30])
    traffic.engine.step()
    (start,) = traffic.runner.plans[0].starts
    assert (start.sampling, start.token_ids, start.num_prompt_tokens) == (sampling, PROMPT, len(PROMPT))
    assert start.stop_token_ids == [30]


def test_a_request_that_the_runner_fails_ends_with_all_its_answers() -> None:
    class FailingRunner(FakeRunner):
        def collect(self) -> StepResult:
            result = super().collect()
            failed = {int(result.slots[0]): "not a number"} if result.step == 2 else {}
            return dataclasses.replace(result, failed=failed)

    engine = Engine(FailingRunner(limits()))
    engine.add(request("fails", PROMPT, n=2, max_tokens=9, ignore_eos=True), [])
    engine.add(request("goes on", PROMPT, max_tokens=9, ignore_eos=True), [])
    deltas, failures = [], {}
    while engine.has_work:
        deltas += engine.step()
        failures |= engine.take_failures()
        engine.scheduler.check_invariants()
    assert failures == {"fails": "not a number"}
    assert [delta.request_id for delta in deltas if delta.finish_reason] == ["goes on"]
    assert engine.stats().kv_usage == 0


def test_what_a_failed_request_computed_is_not_given_to_the_next_one() -> None:
    class FailingRunner(FakeRunner):
        def collect(self) -> StepResult:
            result = super().collect()
            failed = dict.fromkeys(result.slots.tolist(), "not a number") if result.step == 2 else {}
            return dataclasses.replace(result, failed=failed)

    engine = Engine(FailingRunner(limits()))
    num_cached: list[int] = []
    for name in ("fails", "is computed", "is cached"):
        engine.add(request(name, PROMPT, max_tokens=9, ignore_eos=True), [])
        while engine.has_work:
            num_cached += [delta.num_cached_tokens for delta in engine.step() if delta.finish_reason]
            engine.take_failures()
            engine.scheduler.check_invariants()
        num_cached.append(engine.scheduler.prefix_hits)
    assert (num_cached[0], num_cached[2]) == (0, 0), "a block of the failed request was used"
    assert num_cached[-1] > 0


def test_a_request_that_fails_after_it_gave_way_is_forgotten() -> None:
    batch = Batch(limits())
    (sequence,) = make_sequences(
        request("r", PROMPT), (), max_length=len(PROMPT) + 5, turn=Turns().next(request("r", PROMPT), 5), seed=0
    )
    batch.seat(sequence, [0, 1, 2], 0)
    slot, epoch = sequence.slot, int(batch.epochs_N[sequence.slot])
    batch.advance([(slot, 0, len(PROMPT), 1)])
    batch.unseat(sequence, SequenceState.WAITING)
    assert batch.take_absent(slot, epoch) is sequence
    assert batch.take_absent(slot, epoch) is None


def test_an_answer_that_nobody_streams_is_one_delta() -> None:
    traffic = Traffic(limits(max_steps_in_flight=2))
    traffic.add(request("whole", PROMPT, n=2, max_tokens=200 - 100, ignore_eos=True, is_streamed=False, logprobs=1))
    traffic.add(request("sought", PROMPT, max_tokens=5, ignore_eos=True, is_streamed=False, stop=["x"]))
    deltas = []
    while traffic.engine.has_work:
        deltas += traffic.step()
    assert [len(delta.token_ids) for delta in deltas if delta.request_id == "whole"] == [100, 100]
    assert [len(delta.token_ids) for delta in deltas if delta.request_id == "sought"] == [1] * 5
    traffic.drain()


def test_a_stream_waits_for_the_interval_but_neither_at_its_first_token_nor_at_its_end() -> None:
    now_s = 100.0
    engine = Engine(FakeRunner(limits()), stream_interval_s=0.5, clock=lambda: now_s)
    engine.add(request("a", PROMPT, max_tokens=12, ignore_eos=True), [])
    sizes = []
    while engine.has_work:
        sizes.append(sum(len(delta.token_ids) for delta in engine.step()))
        now_s += 0.125
    assert sizes == [1, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 3]


def test_one_who_gives_way_hands_out_what_he_has() -> None:
    traffic = Traffic(limits(num_blocks=8, max_slots=2), enable_prefix_caching=False, stream_interval_s=1e9)
    traffic.expect_short_answers()
    for name, token_id in (("old", 1), ("young", 2)):
        traffic.add(request(name, [token_id] * 8, max_tokens=20, ignore_eos=True, stop_token_ids=[NEVER_DRAWN]))
    sizes = []
    while traffic.engine.stats().num_preemptions == 0:
        sizes.append({delta.request_id: len(delta.token_ids) for delta in traffic.step()})
    assert sizes[0] == {"old": 1, "young": 1}
    assert sizes[-1]["young"] > 1
    traffic.drain()


@pytest.mark.parametrize("depth", [1, 2])
def test_batch_work_gives_way_to_a_better_priority_that_finds_no_slot(depth: int) -> None:
    traffic = Traffic(limits(max_slots=2, max_steps_in_flight=depth))
    traffic.add(request("batch", PROMPT, n=2, max_tokens=40, ignore_eos=True, priority=1))
    for _ in range(4):
        traffic.step()
    traffic.add(request("interactive", [1, 2], max_tokens=3, ignore_eos=True))
    seen = [delta.request_id for _ in range(1 + depth) for delta in traffic.step()]
    assert "interactive" in seen
    assert traffic.engine.stats().num_preemptions == 1
    traffic.drain()


def test_answers_that_turn_out_short_let_more_run_at_once() -> None:
    def num_running(*, is_experienced: bool) -> int:
        traffic = Traffic(limits(num_blocks=40, max_tokens_per_step=64), enable_prefix_caching=False)
        if is_experienced:
            traffic.expect_short_answers()
        for number in range(8):
            traffic.add(
                request(f"r{number}", [number] * 4, max_tokens=60, ignore_eos=True, stop_token_ids=[NEVER_DRAWN])
            )
        traffic.step()
        count = traffic.engine.stats().num_running
        traffic.drain()
        return count

    assert (num_running(is_experienced=False), num_running(is_experienced=True)) == (2, 8)


def test_samples_of_one_prompt_are_a_group_and_steady_steps_say_so() -> None:
    traffic = Traffic(limits(max_slots=12, max_tokens_per_step=64, group_min_members=3, group_min_blocks=2))
    traffic.add(request("alone", [1, 2], max_tokens=9, ignore_eos=True))
    traffic.add(request("a", PROMPT, n=4, max_tokens=12, ignore_eos=True))
    traffic.add(request("b", [*PROMPT[:12], 1, 2], n=3, max_tokens=12, ignore_eos=True))
    for _ in range(4):
        traffic.step()
    plans = traffic.runner.plans
    groups = [sorted(row[1:] for row in plan.groups.tolist()) for plan in plans]
    # At first the first sample of "a" computes what the others read; then all of "a" read 6 blocks, those of "b" 3.
    assert groups == [[[3, 3], [3, 6]], *[[[3, 3], [4, 6]]] * 3]
    assert [plan.is_steady for plan in plans] == [False, False, True, True]
    traffic.drain()


class _FailingRunner(FakeRunner):
    """Fails at every collection once it is told to."""

    is_broken = False

    def collect(self) -> StepResult:
        if self.is_broken:
            raise RuntimeError("illegal memory access")
        return super().collect()


def _engine_with_a_step_too_many() -> tuple[Engine, _FailingRunner]:
    """All answers have ended, and one more step was launched before that was known."""
    runner = _FailingRunner(limits(max_steps_in_flight=2), vocab_size=8)
    engine = Engine(runner)
    engine.add(request("r", [1, 2, 3], max_tokens=50, ignore_eos=True, stop_token_ids=[*range(8)]), ())
    while engine.stats().num_running or engine.stats().num_waiting:
        engine.step()
    assert engine.has_work
    assert runner.num_in_flight == 1
    return engine, runner


def test_steps_beyond_the_last_answer_can_be_waited_for() -> None:
    engine, runner = _engine_with_a_step_too_many()
    engine.drain()
    assert not engine.has_work
    assert runner.num_in_flight == 0
    assert engine.step() == []


def test_an_engine_whose_last_step_failed_never_looks_idle() -> None:
    engine, runner = _engine_with_a_step_too_many()
    runner.is_broken = True
    for advance in (engine.drain, engine.step):
        with pytest.raises(RuntimeError, match="illegal"):
            advance()
        assert engine.has_work
