"""Drives an engine on a fake runner and holds every answer against the oracle."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from flashtensors.engine.lengths import MIN_OBSERVATIONS
from flashtensors.engine.loop import Engine
from flashtensors.engine.sequence import derive_seed, find_max_length
from flashtensors.request import EngineRequest, SamplingParams, SequenceDelta
from flashtensors.step import RunnerLimits, StepPlan, StepPostponed
from flashtensors.testing.fake_runner import FakeRunner, fake_answer, fake_logprobs

VOCAB_SIZE = 32
EOS = [3, 11]

NEVER_DRAWN = VOCAB_SIZE
"""Makes an answer one that might stop, but does not."""

Answer = tuple[str, int]


def limits(**changes: int) -> RunnerLimits:
    values = {"num_blocks": 64, "block_size": 4, "max_slots": 8, "max_tokens_per_step": 32, "max_model_len": 128}
    return RunnerLimits(**{**values, **changes})


def request(
    request_id: str, prompt: list[int], *, priority: int = 0, is_streamed: bool = True, **sampling: object
) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        model="fake",
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"seed": 0, **sampling}),
        priority=priority,
        is_streamed=is_streamed,
    )


class PostponingRunner(FakeRunner):
    """Lets some launches be tried again; the same plan must come then."""

    def __init__(self, limits: RunnerLimits, rate: float) -> None:
        super().__init__(limits, vocab_size=VOCAB_SIZE)
        self.num_postponed = 0
        self._rate = rate
        self._rng = random.Random(0)
        self._postponed: StepPlan | None = None

    def launch(self, plan: StepPlan) -> None:
        assert self._postponed in (None, plan), "another step was launched before one that was postponed"
        if self._rng.random() < self._rate:
            self._postponed = plan
            self.num_postponed += 1
            raise StepPostponed
        self._postponed = None
        super().launch(plan)


@dataclass
class Traffic:
    """An engine under watch: invariants after every step, one last delta for each answer."""

    limits: RunnerLimits
    enable_prefix_caching: bool = True
    max_queue: int | None = None
    stream_interval_s: float = 0.0
    postpone_rate: float = 0.0
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    tokens: dict[Answer, list[int]] = field(default_factory=dict)
    reasons: dict[Answer, str] = field(default_factory=dict)
    aborted: dict[Answer, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.runner = PostponingRunner(self.limits, self.postpone_rate)
        self.engine = Engine(
            self.runner,
            enable_prefix_caching=self.enable_prefix_caching,
            max_queue=self.max_queue,
            seeds=random.Random(0),
            stream_interval_s=self.stream_interval_s,
        )

    def expect_short_answers(self) -> None:
        """Let the engine believe that answers which can stop have one token, so that it admits more than fits."""
        for _ in range(MIN_OBSERVATIONS):
            self.engine.scheduler.lengths.add(1)

    def add(self, request: EngineRequest) -> None:
        self.engine.add(request, EOS)
        self.requests[request.request_id] = request
        for index in range(request.sampling.n):
            self.tokens[request.request_id, index] = []

    def abort(self, request_id: str, index: int | None = None, finish_reason: str = "abort") -> None:
        indices = range(self.requests[request_id].sampling.n) if index is None else [index]
        for answer in [(request_id, index) for index in indices]:
            if answer in self.tokens and answer not in self.reasons:
                self.aborted.setdefault(answer, finish_reason)
        self.engine.abort(request_id, index, finish_reason)
        self.engine.scheduler.check_invariants()

    def step(self) -> list[SequenceDelta]:
        deltas = self.engine.step()
        self.engine.scheduler.check_invariants()
        for delta in deltas:
            self._take(delta)
        still_open = self.aborted.keys() - self.reasons.keys()
        assert not still_open, f"aborted answers without a last delta: {still_open}"
        return deltas

    def _take(self, delta: SequenceDelta) -> None:
        answer = (delta.request_id, delta.index)
        assert answer in self.tokens, f"a delta for {answer}, which nobody asked for"
        assert answer not in self.reasons, f"a delta after the last one of {answer}"
        sampling = self.requests[delta.request_id].sampling
        self.tokens[answer] += delta.token_ids
        wanted = None if sampling.logprobs is None else [fake_logprobs(t, sampling) for t in delta.token_ids]
        assert (delta.logprobs or None) == (wanted or None)
        if delta.finish_reason is not None:
            self.reasons[answer] = delta.finish_reason
        ended_by_token = delta.finish_reason == "stop" and answer not in self.aborted
        assert delta.stop_token_id == (delta.token_ids[-1] if ended_by_token else None)

    def drain(self, max_steps: int = 20_000) -> None:
        """Step until idle; then every answer is as the oracle has it and everything is free."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, "the engine does not come to an end"
        assert self.runner.num_in_flight == 0, "a step is left behind"
        assert self.engine.step() == []
        assert self.reasons.keys() == self.tokens.keys(), "an answer without a last delta"
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
        assert stats.num_generated == sum(map(len, self.tokens.values()))
        for answer in self.tokens:
            self._check_answer(answer)

    def _check_answer(self, answer: Answer) -> None:
        expected, reason = self.expected(answer)
        if answer in self.aborted:
            got = self.tokens[answer]
            assert got == expected[: len(got)], f"{answer} went wrong before it was aborted"
            assert self.reasons[answer] == self.aborted[answer]
        else:
            assert (self.tokens[answer], self.reasons[answer]) == (expected, reason), f"{answer} differs"

    def expected(self, answer: Answer) -> tuple[list[int], str]:
        """The oracle's tokens and finish reason."""
        request = self.requests[answer[0]]
        sampling = request.sampling
        assert sampling.seed is not None, "only fixed seeds have an oracle"
        stops = [*sampling.stop_token_ids, *([] if sampling.ignore_eos else EOS)]
        tokens = fake_answer(
            request.prompt_token_ids,
            sampling,
            seed=derive_seed(sampling.seed, answer[1]),
            stop_token_ids=stops,
            max_length=find_max_length(request, self.limits),
            vocab_size=VOCAB_SIZE,
        )
        is_stopped = tokens[-1] in stops and len(tokens) > sampling.min_tokens
        return tokens, "stop" if is_stopped else "length"
