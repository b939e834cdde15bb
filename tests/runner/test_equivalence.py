"""Models of ordinary head dims: however a step is run, cut, shared or begun again, what follows a text stays the same.

In bf16 the logprobs after known texts, in float32 the greedy tokens of an engine. Both are held against the plain
runner in float32 on the CPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from flashtensors.checkpoint.architecture import ExpertsConfig, ModelConfig
from flashtensors.engine.loop import Engine
from flashtensors.engine.stats import EngineStats
from flashtensors.models.registry import Model, build_model, weight_layout
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.runner.graph_runner import GraphRunner
from flashtensors.runner.torch_runner import TorchRunner
from flashtensors.runner.workspace import Workspace
from flashtensors.step import NUM_APPEND_COLUMNS, NUM_GROUP_COLUMNS, RunnerLimits, StepPlan, StepResult, int_rows

from .driver import LLAMA, Driver

VOCAB_SIZE = 1000
SEED = 1
"""Of the weights: at each token of the answers the likeliest logit is 1.8e-4 above the next; float32 errs by 2e-5."""
BLOCK_SIZE = 64
LIMITS = RunnerLimits(
    num_blocks=400,
    block_size=BLOCK_SIZE,
    max_slots=112,
    max_tokens_per_step=8192,
    max_model_len=320,
    max_steps_in_flight=2,
    group_min_members=2,
)
EXPERTS = ExpertsConfig(
    num_experts=8, num_experts_per_tok=2, intermediate_size=128, norm_topk_prob=True, layers=(True, True)
)
FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True},
    "mistral": {"model_type": "mistral", "sliding_window": 100, "sliding_layers": (True, True)},
}
MORE_FAMILIES = FAMILIES | {
    "gemma3": {
        "model_type": "gemma3_text", "qk_norm": True, "hidden_act": "gelu_pytorch_tanh", "embedding_scale": 16.0,
        "sliding_window": 100, "sliding_layers": (True, False), "rope_theta": 1e6, "rope_local_theta": 1e4,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "qk_norm": True, "experts": EXPERTS},
    "mixtral": {"model_type": "mixtral", "experts": EXPERTS},
}  # fmt: skip
"""And those whose tokens alone are held: in bf16 some go to other experts, and Gemma's sums are of larger numbers."""
NUM_SEQS = (1, 8, 64, 100)
SHARED = np.random.default_rng(0).integers(VOCAB_SIZE, size=2 * BLOCK_SIZE).tolist()
"""What all texts begin with: whole blocks."""
WITH_LOGPROBS = SamplingParams(temperature=0, logprobs=20)
BF16_MOST, BF16_MEAN = 0.2, 0.08
"""Error of a logprob in bf16; twice what plain torch makes. Logits near 8 alone are rounded to 1/32."""
SAME_MOST, SAME_MEAN = 0.1, 0.02
"""Difference of logprobs that the same kernels computed, whose sums may be added up in another order."""


def config_of(family: str, head_dim: int) -> ModelConfig:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return msgspec.structs.replace(
        LLAMA, **shape, head_dim=head_dim, vocab_size=VOCAB_SIZE, max_position_embeddings=1024, **MORE_FAMILIES[family]
    )


def make_model(config: ModelConfig, dtype: torch.dtype, device: str) -> Model:
    """Weights that bf16 holds, in any dtype; logits differ well from token to token."""
    generator, weights = torch.Generator().manual_seed(SEED), {}
    for weight in weight_layout(config).weights:
        values = torch.randn(weight.shape, generator=generator)
        if weight.name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif weight.name.endswith(".bias"):
            values *= 0.5
        elif weight.name != "embedding.weight":
            values *= (2 if weight.name == "head.weight" else 1.4) * weight.shape[-1] ** -0.5
        weights[weight.name] = values.bfloat16().to(device=device, dtype=dtype)
    return build_model(config, weights, dtype=dtype)


def make_plain_runner(config: ModelConfig) -> TorchRunner:
    limits = msgspec.structs.replace(LIMITS, max_steps_in_flight=1, group_min_members=0)
    model, device = make_model(config, torch.float32, "cpu"), torch.device("cpu")
    return TorchRunner(model, config, limits=limits, device=device, dtype=torch.float32)


def make_graph_runner(
    config: ModelConfig, workspace: Workspace, *, dtype: torch.dtype, is_eager: bool = False, has_groups: bool = True
) -> GraphRunner:
    model = make_model(config, dtype, workspace.device.type)
    limits = LIMITS if has_groups else msgspec.structs.replace(LIMITS, group_min_members=0)
    return GraphRunner(model, config, limits=limits, dtype=dtype, workspace=workspace, enforce_eager=is_eager)


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    space = Workspace(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield space
    space.close()


def text_of(number: int) -> list[int]:
    own = np.random.default_rng(1 + number).integers(VOCAB_SIZE, size=8 + 7 * number % 40)
    return SHARED + own.tolist()


class SharingDriver(Driver):
    """A driver whose sequences may begin with the blocks of another, which they read as a group."""

    prefix: list[int] | None = None

    def share_prefix(self, slot: int) -> None:
        """Compute what all share in this slot, and let all who start from now on begin with it."""
        self.start(slot, SHARED, WITH_LOGPROBS)
        self.step({slot: len(SHARED)})
        self.prefix = list(self.blocks[slot])

    def begin(self, slot: int, token_ids: list[int]) -> None:
        self.start(slot, token_ids, WITH_LOGPROBS)
        if self.prefix is not None:
            self.blocks[slot], self.computed[slot] = list(self.prefix), len(SHARED)

    def plan(self, chunks: dict[int, int]) -> StepPlan:
        begun, prefix = [start.slot for start in self._starts], self.prefix
        plan = super().plan(chunks)
        if prefix is None:
            return plan
        tables = [(slot, index, block) for slot in begun for index, block in enumerate(prefix)]
        return dataclasses.replace(
            plan,
            block_appends=np.concatenate((int_rows(tables, NUM_APPEND_COLUMNS), plan.block_appends)),
            groups=int_rows([(0, len(chunks), len(prefix))] if len(chunks) > 1 else [], NUM_GROUP_COLUMNS),
        )

    def forget(self, slots: range) -> None:
        """Give back all blocks of these slots but those that are not their own."""
        num_shared = 0 if self.prefix is None else len(self.prefix)
        for slot in slots:
            self.free += self.blocks.pop(slot)[num_shared:]


def logprobs_after_texts(driver: SharingDriver, num_seqs: int) -> list[dict[int, float]]:
    """The likeliest tokens after each text, whose last tokens are computed one by one.

    Some begin while others decode; some lose their blocks then, and are computed again.
    """
    slots = range(num_seqs)
    texts = [text_of(slot) for slot in slots]
    early, late = slots[::2], slots[1::2]
    for slot in early:
        driver.begin(slot, texts[slot])
    driver.step({slot: len(texts[slot]) - 4 - driver.computed[slot] for slot in early})
    for slot in late:
        driver.begin(slot, texts[slot])
    driver.step({slot: 1 if slot in early else len(texts[slot]) - 3 - driver.computed[slot] for slot in slots})
    again = slots[::4]
    num_shared = 0 if driver.prefix is None else len(driver.prefix)
    for slot in again:
        driver.blocks[slot], lost = [], driver.blocks[slot][num_shared:]
        driver.begin(slot, texts[slot])
        driver.free = lost + driver.free
    driver.step({slot: len(texts[slot]) - 2 - driver.computed[slot] if slot in again else 1 for slot in slots})
    driver.step(dict.fromkeys(slots, 1))
    logprobs = driver.step(dict.fromkeys(slots, 1)).logprobs
    driver.forget(slots)
    return [dict(logprobs[slot].top) for slot in slots]


@functools.cache
def expected_logprobs(family: str, head_dim: int) -> list[dict[int, float]]:
    """After each text, by the plain runner in one go."""
    with make_plain_runner(config_of(family, head_dim)) as runner:
        driver = Driver(runner)
        found = []
        for number in range(max(NUM_SEQS)):
            text = text_of(number)
            driver.start(0, text, WITH_LOGPROBS)
            found.append(dict(driver.step({0: len(text)}).logprobs[0].top))
        return found


def check_close(actual: list[dict[int, float]], expected: list[dict[int, float]], *, most: float, mean: float) -> None:
    """The five likeliest tokens after each text have about the same logprobs."""
    errors = [
        abs(found.get(token_id, -np.inf) - logprob)
        for found, wanted in zip(actual, expected, strict=False)
        for token_id, logprob in list(wanted.items())[:5]
    ]
    assert max(errors) < most, f"text {int(np.argmax(errors)) // 5} of {len(actual)}"
    assert np.mean(errors) < mean


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_fp32_and_graphs_change_nothing(family: str, head_dim: int, workspace: Workspace) -> None:
    expected, config = expected_logprobs(family, head_dim), config_of(family, head_dim)
    make = functools.partial(make_graph_runner, config, workspace, dtype=torch.bfloat16)
    has_groups = (False,) if config.sliding_layers else (False, True)
    for shares in has_groups:
        with make(is_eager=True) as eager, make() as captured:
            drivers = SharingDriver(eager), SharingDriver(captured)
            for driver in drivers:
                if shares:
                    driver.share_prefix(max(NUM_SEQS))
            for num_seqs in NUM_SEQS:
                plainly = logprobs_after_texts(drivers[0], num_seqs)
                check_close(plainly, expected, most=BF16_MOST, mean=BF16_MEAN)
                for _ in range(2):  # the first captures
                    found = logprobs_after_texts(drivers[1], num_seqs)
                    check_close(found, plainly, most=SAME_MOST, mean=SAME_MEAN)
            assert eager.num_captures == 0
            assert captured.num_captures >= 2 * len(NUM_SEQS), "neither prompts nor decodes were captured"


class Watched:
    """A runner that counts steps with groups."""

    def __init__(self, runner: GraphRunner | TorchRunner) -> None:
        self.runner = runner
        self.num_grouped = 0

    @property
    def limits(self) -> RunnerLimits:
        return self.runner.limits

    def launch(self, plan: StepPlan) -> None:
        self.num_grouped += len(plan.groups) > 0
        self.runner.launch(plan)

    def collect(self) -> StepResult:
        return self.runner.collect()


NUM_REQUESTS = 40
NUM_NEW = 24
FEW_BLOCKS = 40
"""For a dozen of them."""


def generate(
    runner: GraphRunner | TorchRunner, *, num_blocks: int = LIMITS.num_blocks, has_cache: bool = True
) -> tuple[list[list[int]], EngineStats, int]:
    """Greedy answers to texts of which some come while others decode; stats; and how many steps had groups."""
    runner.dock(num_blocks)
    watched = Watched(runner)
    engine, answers = Engine(watched, enable_prefix_caching=has_cache), [[] for _ in range(NUM_REQUESTS)]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    waiting = list(range(NUM_REQUESTS))
    while waiting or engine.has_work:
        for number in waiting[:10]:
            text = text_of(number)
            prompt = text if number % 3 else text[::-1]
            # the later half is more urgent, and takes the blocks of those who run where there are no others
            priority = int(number < NUM_REQUESTS // 2)
            fields = {"prompt_token_ids": prompt, "sampling": sampling, "priority": priority}
            engine.add(EngineRequest(request_id=f"{number}", model="", **fields), ())
        del waiting[:10]
        for _ in range(5):
            for delta in engine.step():
                answers[int(delta.request_id)] += delta.token_ids
    return answers, engine.stats(), watched.num_grouped


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_an_engine_answers_with_the_same_tokens_however_it_runs(
    family: str, head_dim: int, workspace: Workspace
) -> None:
    config = config_of(family, head_dim)
    with make_plain_runner(config) as runner:
        expected, _, _ = generate(runner, has_cache=False)
    make = functools.partial(make_graph_runner, config, workspace, dtype=torch.float32)
    has_groups = not config.sliding_layers
    with make(has_groups=has_groups) as runner:
        for _ in range(2):
            answers, stats, num_grouped = generate(runner)
            assert answers == expected
            assert stats.prefix_hits > 0
            assert (num_grouped > 0) == has_groups
        assert runner.num_captures > 0
        answers, stats, num_grouped = generate(runner, has_cache=False)
        assert (answers, stats.prefix_hits, num_grouped) == (expected, 0, 0)
        for has_cache in (True, False):
            answers, stats, _ = generate(runner, num_blocks=FEW_BLOCKS, has_cache=has_cache)
            assert answers == expected
            assert stats.num_preemptions > 0
    with make(has_groups=False) as runner:
        answers, stats, num_grouped = generate(runner)
        assert (answers, num_grouped) == (expected, 0)
    with make(has_groups=has_groups, is_eager=True) as runner:
        assert generate(runner)[0] == expected
        assert runner.num_captures == 0
