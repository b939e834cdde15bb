"""Steps made of kernels, and captured as graphs on a GPU, against the plain runner on the CPU.

Without a GPU the kernels run in Triton's interpreter, and nothing is captured.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.checkpoint.config_experts import ExpertsConfig
from flashtensors.engine.loop import Engine
from flashtensors.models.registry import build_model, weight_layout
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.runner import changed_draws
from flashtensors.runner.graph_runner import GraphRunner
from flashtensors.runner.torch_runner import NOT_FINITE, TorchRunner
from flashtensors.runner.workspace import Workspace
from flashtensors.step import NUM_GROUP_COLUMNS, RunnerLimits, StepPlan, int_rows

from .driver import GEMMA, GREEDY, VOCAB_SIZE, Driver, make_model, prompt_of
from .driver import LLAMA as NARROW_LLAMA

LLAMA = msgspec.structs.replace(NARROW_LLAMA, head_dim=16, num_key_value_heads=1)
CONFIGS = {
    "llama": LLAMA,
    "gemma": GEMMA,
    "qwen2": msgspec.structs.replace(LLAMA, model_type="qwen2", attention_bias=True),
    "qwen3": msgspec.structs.replace(LLAMA, model_type="qwen3", qk_norm=True),
    "mistral": msgspec.structs.replace(LLAMA, model_type="mistral", sliding_window=20, sliding_layers=(True, True)),
}
MIXTURES = {
    model_type: msgspec.structs.replace(
        LLAMA,
        model_type=model_type,
        qk_norm=model_type == "qwen3_moe",
        num_hidden_layers=len(layers),
        experts=ExpertsConfig(
            num_experts=8, num_experts_per_tok=2, intermediate_size=64, norm_topk_prob=True, layers=layers
        ),
    )
    for model_type, layers in (("qwen3_moe", (False, True, True)), ("mixtral", (True, True)))
}
LIMITS = RunnerLimits(
    num_blocks=24, block_size=16, max_slots=6, max_tokens_per_step=64, max_model_len=80, max_steps_in_flight=2
)
IS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(IS_GPU, reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
every_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def workspace(device: str) -> Iterator[Workspace]:
    space = Workspace(torch.device(device))
    yield space
    space.close()


def graph_driver(config: ModelConfig, workspace: Workspace, *, seed: int = 0, enforce_eager: bool = False) -> Driver:
    model = make_model(config, workspace.device.type)
    runner = GraphRunner(
        model, config, limits=LIMITS, dtype=torch.float32, workspace=workspace, enforce_eager=enforce_eager
    )
    return Driver(runner, seed)


def plain_driver(config: ModelConfig, seed: int = 0) -> Driver:
    limits = msgspec.structs.replace(LIMITS, max_steps_in_flight=1)
    device = torch.device("cpu")
    return Driver(TorchRunner(make_model(config), config, limits=limits, device=device, dtype=torch.float32), seed)


def run_tour(driver: Driver, num_new: int = 4) -> dict[int, list[int]]:
    """Sequences of many lengths in random chunks, and a slot that is used again."""
    lengths = (1, 3, 16, 9, 33, 50) if IS_GPU else (1, 16, 9, 33)
    prompts = {slot: prompt_of(length, slot) for slot, length in enumerate(lengths)}
    for slot, prompt in prompts.items():
        driver.start(slot, prompt, GREEDY)
    driver.finish({slot: len(prompt) + num_new for slot, prompt in prompts.items()}, longest_chunk=20)
    answers = {slot: list(token_ids) for slot, token_ids in driver.token_ids.items()}
    driver.start(2, prompt_of(5, 99), GREEDY)
    driver.finish({2: 5 + num_new})
    return answers | {99: driver.token_ids[2]}


@every_device
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_chunks_and_decodes_equal_the_plain_runner(config: ModelConfig, device: str, workspace: Workspace) -> None:
    expected = run_tour(plain_driver(config))
    driver = graph_driver(config, workspace)
    assert run_tour(driver) == expected
    if device == "cuda":
        driver.token_ids.clear()
        assert run_tour(driver) == expected
        assert driver.runner.num_captures > 0
        assert run_tour(graph_driver(config, workspace, enforce_eager=True)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_experts_give_the_same_tokens_with_graphs_and_without(config: ModelConfig, workspace: Workspace) -> None:
    expected = run_tour(plain_driver(config))
    driver, captures = graph_driver(config, workspace), []
    for _ in range(4):
        driver.random = random.Random(1)
        assert run_tour(driver) == expected
        captures.append(driver.runner.num_captures)
    assert captures[-1] == captures[-2] > 0
    assert run_tour(graph_driver(config, workspace, enforce_eager=True)) == expected


@every_device
def test_who_gave_way_goes_on_with_the_same_tokens(workspace: Workspace) -> None:
    patient, urgent = prompt_of(10, 1), prompt_of(20, 2)
    plain = plain_driver(LLAMA)
    plain.start(0, patient, GREEDY)
    plain.start(1, urgent, GREEDY)
    plain.finish({0: 32, 1: 28})
    runner = graph_driver(LLAMA, workspace).runner
    assert isinstance(runner, GraphRunner)
    runner.dock(3)
    engine, answers = Engine(runner, enable_prefix_caching=False), {"patient": list(patient), "urgent": list(urgent)}

    def add(name: str, priority: int, max_tokens: int) -> None:
        sampling = msgspec.structs.replace(GREEDY, max_tokens=max_tokens, ignore_eos=True)
        prompt = list(answers[name])
        engine.add(
            EngineRequest(request_id=name, model="m", prompt_token_ids=prompt, sampling=sampling, priority=priority),
            (),
        )

    add("patient", 1, 22)
    for step in range(200):
        if step == 9:
            add("urgent", 0, 8)
        for delta in engine.step():
            answers[delta.request_id] += delta.token_ids
        if not engine.has_work:
            break
    assert engine.stats().num_preemptions == 1
    assert answers == {"patient": plain.token_ids[0], "urgent": plain.token_ids[1]}


ZOO = [
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.2, top_k=7),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=0.7, min_p=0.05, top_p=0.95, top_k=30),
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, min_p=0.1),
]
CHANGED = [
    SamplingParams(temperature=0.7, min_p=0.05, top_k=30, repetition_penalty=1.3),
    SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 4.0, 5: -100.0}),
    SamplingParams(temperature=1.0, min_p=0.1, frequency_penalty=-0.3, logprobs=3),
    SamplingParams(temperature=0.9, min_tokens=5),
    SamplingParams(temperature=1.1),
]


def run_zoo(driver: Driver, zoo: list[SamplingParams]) -> dict[int, list[int]]:
    lengths = {}
    for slot, sampling in enumerate(zoo):
        prompt = prompt_of(3 + 5 * slot, slot)
        driver.start(slot, prompt, sampling, seed=1000 + slot, stop_token_ids=[1, 2])
        lengths[slot] = len(prompt) + 7
    driver.finish(lengths, longest_chunk=30)
    return driver.token_ids


@every_device
@pytest.mark.parametrize("zoo", [ZOO[:2], ZOO[2:], CHANGED], ids=["plain", "nuclei", "changed"])
def test_every_kind_of_draw_equals_the_plain_runner(zoo: list[SamplingParams], workspace: Workspace) -> None:
    assert run_zoo(graph_driver(LLAMA, workspace), zoo) == run_zoo(plain_driver(LLAMA), zoo)


@every_device
def test_rows_that_are_drawn_in_parts_equal_the_plain_runner(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changed_draws, "PART_ROWS", 2)
    zoo = [msgspec.structs.replace(sampling, logprobs=2) for sampling in CHANGED]
    assert run_zoo(graph_driver(LLAMA, workspace), zoo) == run_zoo(plain_driver(LLAMA), zoo)


@every_device
def test_stops_logprobs_and_failures_equal_the_plain_runner(workspace: Workspace) -> None:
    results = []
    for driver in (graph_driver(LLAMA, workspace), plain_driver(LLAMA)):
        driver.start(0, [1, 2, 3], SamplingParams(temperature=1.0, logprobs=2), seed=1)
        driver.start(1, [4, 5, 6, 7, 8], GREEDY, stop_token_ids=list(range(VOCAB_SIZE)))
        driver.start(2, [9], SamplingParams(temperature=0, min_tokens=2), stop_token_ids=[3, 7])
        driver.start(3, prompt_of(20, 1), SamplingParams(logprobs=1))
        driver.step({0: 2, 1: 5, 2: 1, 3: 10})
        caches = driver.runner.kv_caches
        caches[0][1][driver.blocks[0]] = torch.nan
        if caches[0][1].is_cuda:
            torch.cuda.synchronize()
        results += [driver.step({0: 1, 1: 1, 2: 1, 3: 4}), driver.step({1: 1, 2: 1})]
    for actual, expected in zip(results[:2], results[2:], strict=True):
        assert actual.slots.tolist() == expected.slots.tolist()
        assert actual.token_ids.tolist() == expected.token_ids.tolist()
        assert actual.is_stopped.tolist() == expected.is_stopped.tolist()
        assert actual.failed == expected.failed
        assert actual.logprobs.keys() == expected.logprobs.keys()
    assert results[0].failed == {0: NOT_FINITE}


@every_device
def test_logprobs_equal_those_of_the_plain_runner(workspace: Workspace) -> None:
    results = []
    for driver in (graph_driver(LLAMA, workspace), plain_driver(LLAMA)):
        driver.start(4, prompt_of(20, 1), SamplingParams(logprobs=3, temperature=0.5), seed=3)
        driver.start(1, prompt_of(2, 1), GREEDY)
        results.append(driver.step({1: 2, 4: 20}).logprobs)
    assert results[0].keys() == results[1].keys() == {4}
    actual, expected = results[0][4], results[1][4]
    assert actual.logprob == pytest.approx(expected.logprob, abs=1e-4)
    assert [token_id for token_id, _ in actual.top] == [token_id for token_id, _ in expected.top]
    assert [logprob for _, logprob in actual.top] == pytest.approx([value for _, value in expected.top], abs=1e-4)


@every_device
def test_two_steps_in_flight_read_what_earlier_ones_drew(workspace: Workspace) -> None:
    prompts = {slot: prompt_of(3 + 6 * slot, slot) for slot in range(4)}
    plain = plain_driver(LLAMA)
    for slot, prompt in prompts.items():
        plain.start(slot, prompt, GREEDY)
    plain.finish({slot: len(prompt) + 8 for slot, prompt in prompts.items()})
    driver = graph_driver(LLAMA, workspace)
    for slot, prompt in prompts.items():
        driver.start(slot, prompt, GREEDY)
    drawn: dict[int, list[int]] = {slot: [] for slot in prompts}
    previous: StepPlan | None = None
    for step in range(8):
        plan = driver.plan(dict.fromkeys(prompts, 40))
        if previous is not None and len(plan.starts) == 0:
            is_steady = bool((previous.spans[:, 2] == 1).all())
            plan = StepPlan(step=plan.step, block_appends=plan.block_appends, spans=plan.spans, is_steady=is_steady)
        driver.runner.launch(plan)
        previous = plan
        for token_ids in driver.token_ids.values():
            token_ids.append(-1)  # nobody knows the token yet, and need not
        if step >= 1:
            result = driver.runner.collect()
            assert result.step == step - 1
            for slot, token_id in zip(result.slots.tolist(), result.token_ids.tolist(), strict=True):
                drawn[slot].append(token_id)
    for slot, prompt in prompts.items():
        assert plain.token_ids[slot][: len(prompt) + 7] == prompt + drawn[slot]


@every_device
@pytest.mark.parametrize("is_fetched", [False, True])
def test_a_step_that_could_not_be_queued_leaves_the_next_ones_whole(
    is_fetched: bool, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_tour(plain_driver(LLAMA))
    driver = graph_driver(LLAMA, workspace)
    run_tour(driver)
    driver.random, driver.free = random.Random(0), list(range(LIMITS.num_blocks))
    driver.blocks.clear()
    with monkeypatch.context() as patched:

        def fail(*_: object) -> None:
            if is_fetched:
                driver.runner._slots.fetch()
            raise RuntimeError("no room")

        patched.setattr(driver.runner._graphs, "run", fail)
        driver.start(0, [1, 2, 3], GREEDY)
        with pytest.raises(RuntimeError, match="no room"):
            driver.step({0: 3})
    driver.random, driver.free = random.Random(0), list(range(LIMITS.num_blocks))
    driver.blocks.clear()
    assert run_tour(driver) == expected


@every_device
def test_groups_change_nothing(workspace: Workspace) -> None:
    shared, answers = prompt_of(32, 5), []
    for has_groups in (False, True):
        driver = graph_driver(LLAMA, workspace)
        driver.start(0, shared, GREEDY)
        driver.step({0: 32})
        prefix = driver.blocks[0][:2]
        for slot in range(1, 5):
            driver.start(slot, [*shared, *prompt_of(slot, slot)], GREEDY)
            driver.computed[slot], driver.blocks[slot] = 32, list(prefix)
        for _ in range(3):
            plan = driver.plan(dict.fromkeys(range(1, 5), 99))
            appends = plan.block_appends
            if plan.starts:
                tables = [(slot, index, block) for slot in range(1, 5) for index, block in enumerate(prefix)]
                appends = np.concatenate((int_rows(tables, 3), appends))
            groups = int_rows([(0, 4, 2)] if has_groups else [], NUM_GROUP_COLUMNS)
            driver.runner.launch(
                StepPlan(step=plan.step, starts=plan.starts, block_appends=appends, spans=plan.spans, groups=groups)
            )
            result = driver.runner.collect()
            for slot, token_id in zip(result.slots.tolist(), result.token_ids.tolist(), strict=True):
                driver.token_ids[slot].append(token_id)
        answers.append([driver.token_ids[slot] for slot in range(1, 5)])
    assert answers[0] == answers[1]
    plain = plain_driver(LLAMA)
    for slot in range(1, 5):
        plain.start(slot, [*shared, *prompt_of(slot, slot)], GREEDY)
    plain.finish({slot: 32 + slot + 3 for slot in range(1, 5)})
    assert [plain.token_ids[slot] for slot in range(1, 5)] == answers[0]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_an_fp8_cache_gives_nearly_the_same_logprobs(workspace: Workspace) -> None:
    found = []
    for kv_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        weights = {name: tensor.bfloat16().cuda() for name, tensor in random_weights(0).items()}
        model = build_model(LLAMA, weights, dtype=torch.bfloat16)
        driver = Driver(
            GraphRunner(model, LLAMA, limits=LIMITS, dtype=torch.bfloat16, workspace=workspace, kv_dtype=kv_dtype)
        )
        driver.start(0, prompt_of(40, 1), SamplingParams(temperature=0, logprobs=20))
        driver.step({0: 39})
        found.append(dict(driver.step({0: 1}).logprobs[0].top))
    likely = {token_id: logprob for token_id, logprob in found[0].items() if logprob > -4}
    assert likely
    for token_id, logprob in likely.items():
        assert found[1][token_id] == pytest.approx(logprob, abs=0.25)


@every_device
def test_a_gate_is_asked_layer_by_layer_until_it_opens(workspace: Workspace) -> None:
    driver = graph_driver(LLAMA, workspace)
    asked: list[int | None] = []
    driver.runner.dock(LIMITS.num_blocks, asked.append)
    driver.start(0, prompt_of(9, 9), GREEDY)
    driver.step({0: 9})
    assert asked == [0, *range(LLAMA.num_hidden_layers), None]
    driver.runner.gate_open()
    driver.step({0: 1})
    assert len(asked) == LLAMA.num_hidden_layers + 2


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        weight.name: torch.randn(weight.shape, generator=generator).mul_(0.4) for weight in weight_layout(LLAMA).weights
    }


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_graphs_serve_other_weights_at_the_same_addresses(workspace: Workspace) -> None:
    place = {name: tensor.cuda() for name, tensor in random_weights(0).items()}
    model = build_model(LLAMA, place, dtype=torch.float32)
    runner = GraphRunner(model, LLAMA, limits=LIMITS, dtype=torch.float32, workspace=workspace)
    for seed in (0, 0, 3, 0):
        torch.cuda.synchronize()
        for name, tensor in random_weights(seed).items():
            place[name].copy_(tensor)
        torch.cuda.synchronize()
        runner.dock(LIMITS.num_blocks)
        limits = msgspec.structs.replace(LIMITS, max_steps_in_flight=1)
        plain = build_model(LLAMA, random_weights(seed), dtype=torch.float32)
        oracle = TorchRunner(plain, LLAMA, limits=limits, device=torch.device("cpu"), dtype=torch.float32)
        num_captures = runner.num_captures
        assert run_tour(Driver(runner)) == run_tour(Driver(oracle))
    assert runner.num_captures == num_captures > 0


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("config", [LLAMA, *MIXTURES.values()], ids=["llama", *MIXTURES])
def test_a_warm_runner_captures_and_compiles_nothing(config: ModelConfig, workspace: Workspace) -> None:
    from triton import knobs

    driver = graph_driver(config, workspace)
    for _ in range(3):
        driver.random = random.Random(1)
        run_tour(driver)
    num_captures, compiled = driver.runner.num_captures, []
    knobs.runtime.jit_post_compile_hook = lambda **about: compiled.append(about["fn"].name)
    try:
        driver.random = random.Random(1)
        run_tour(driver)
    finally:
        knobs.runtime.jit_post_compile_hook = None
    assert (driver.runner.num_captures, compiled) == (num_captures, [])


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
def test_a_step_does_not_wait_for_bytes_that_another_model_is_loaded_from(workspace: Workspace) -> None:
    driver, plain = graph_driver(LLAMA, workspace), plain_driver(LLAMA)
    source = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    other = torch.cuda.Stream()
    expected = run_tour(plain)
    assert run_tour(driver) == expected  # and all graphs are there
    driver.token_ids.clear()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        for _ in range(400):  # some two seconds of a link
            target.copy_(source, non_blocking=True)
        ended = torch.cuda.Event()
        ended.record()
    assert run_tour(driver) == expected
    assert not ended.query(), "the steps came after the copies"
    torch.cuda.synchronize()
