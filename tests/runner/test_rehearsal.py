"""A rehearsal takes the steps that models take, and leaves nothing for them to compile."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.checkpoint.config_experts import ExpertsConfig
from flashtensors.kernels.binaries import keep_binaries_in, list_binaries, warm
from flashtensors.models.registry import build_model, weight_layout
from flashtensors.request import SamplingParams
from flashtensors.runner.graph_runner import GraphRunner
from flashtensors.runner.rehearsal import StepKinds, rehearsal_calls
from flashtensors.runner.workspace import Workspace
from flashtensors.step import NUM_GROUP_COLUMNS, RunnerLimits, StepPlan, int_rows

from .driver import GEMMA, LLAMA, Driver, prompt_of

LIMITS = RunnerLimits(
    num_blocks=99, block_size=16, max_slots=20, max_tokens_per_step=100, max_model_len=150, max_steps_in_flight=2
)
EXPERTS = ExpertsConfig(
    num_experts=8, num_experts_per_tok=2, intermediate_size=64, norm_topk_prob=True, layers=(True, False, True, True)
)
MOE = msgspec.structs.replace(LLAMA, model_type="qwen3_moe", num_hidden_layers=4, qk_norm=True, experts=EXPERTS)


def test_layers_of_every_kind_and_the_last_one_are_rehearsed() -> None:
    plain = StepKinds.of(
        msgspec.structs.replace(LLAMA, num_hidden_layers=9), LIMITS, dtype="float32", kv_dtype="float32"
    )
    assert plain.config.num_hidden_layers == 2
    moe = StepKinds.of(MOE, LIMITS, dtype="float32", kv_dtype="float32").config
    assert moe.experts is not None
    assert moe.experts.layers == (True, False, True)
    gemma = StepKinds.of(GEMMA, LIMITS, dtype="float32", kv_dtype="float32").config
    assert gemma.sliding_layers == (True, False, False)


def test_models_that_differ_in_what_only_the_host_reads_rehearse_alike() -> None:
    other = msgspec.structs.replace(LLAMA, num_hidden_layers=7, eos_token_ids=(3,), weight_prefix="x.", dtype="float16")
    larger = msgspec.structs.replace(LIMITS, num_blocks=7)
    kinds = [
        StepKinds.of(config, limits, dtype="bfloat16", kv_dtype="bfloat16")
        for config, limits in ((LLAMA, LIMITS), (other, larger))
    ]
    assert kinds[0] == kinds[1]
    assert msgspec.json.decode(msgspec.json.encode(kinds[0]), type=StepKinds) == kinds[0]


@pytest.mark.parametrize("config", [LLAMA, GEMMA, MOE], ids=["llama", "gemma", "moe"])
@pytest.mark.parametrize("max_model_len", [9, 150])
def test_every_step_is_one_that_a_runner_takes(config: ModelConfig, max_model_len: int) -> None:
    limits = msgspec.structs.replace(LIMITS, max_model_len=max_model_len, group_min_members=2, max_steps_in_flight=1)
    kinds = StepKinds.of(config, limits, dtype="float32", kv_dtype="float32")
    calls = rehearsal_calls(kinds, torch.device("cpu"))
    assert len(calls) >= 4
    for call in calls:
        call()


SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
}
GPU_LIMITS = RunnerLimits(
    num_blocks=600,
    block_size=64,
    max_slots=256,
    max_tokens_per_step=2048,
    max_model_len=1900,
    max_steps_in_flight=2,
    group_min_members=2,
)
GPU_CONFIGS = {
    name: msgspec.structs.replace(config, **SHAPE)
    for name, config in {"llama": LLAMA, "gemma": GEMMA, "moe": MOE}.items()
}


def random_runner(config: ModelConfig, workspace: Workspace, kv_dtype: torch.dtype) -> GraphRunner:
    generator = torch.Generator("cuda").manual_seed(0)
    weights = {
        weight.name: torch.randn(weight.shape, generator=generator, device="cuda").mul_(0.05).bfloat16()
        for weight in weight_layout(config).weights
    }
    model = build_model(config, weights, dtype=torch.bfloat16)
    dtype = torch.bfloat16
    return GraphRunner(model, config, limits=GPU_LIMITS, dtype=dtype, workspace=workspace, kv_dtype=kv_dtype)


def run_all_sorts(driver: Driver) -> None:
    """Prompts in chunks, decodes, groups, and draws of every kind, of numbers that no bucket was made for."""
    zoo = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, logprobs=7),
        SamplingParams(temperature=0.9, min_tokens=5, min_p=0.1, top_k=9),
    ]
    for num_seqs, length in ((1, 1), (1, 1700), (3, 130), (37, 40), (150, 9), (5, 300), (256, 2)):
        for sampling in zoo:
            for slot in range(num_seqs):
                prompt = [token % 61 for token in prompt_of(length, slot)]
                driver.start(slot, prompt, sampling, seed=slot, stop_token_ids=[7])
            slots = range(num_seqs)
            while waiting := [slot for slot in slots if driver.computed[slot] < len(driver.token_ids[slot])][:300]:
                if all(len(driver.token_ids[slot]) >= length + 3 for slot in waiting):
                    break
                driver.step(dict.fromkeys(waiting, 2048 // max(len(waiting), 2) if length > 9 else 8))
    run_groups(driver)


def run_groups(driver: Driver) -> None:
    shared = prompt_of(128, 5)
    driver.start(0, shared, SamplingParams(temperature=0.6))
    driver.step({0: 128})
    prefix = driver.blocks[0][:2]
    for num_seqs in (2, 9, 70):
        for slot in range(1, num_seqs + 1):
            driver.start(slot, [*shared, *prompt_of(slot % 20 + 1, slot)], SamplingParams(temperature=0.6))
            driver.computed[slot], driver.blocks[slot] = 128, list(prefix)
        for _ in range(3):
            plan = driver.plan(dict.fromkeys(range(1, num_seqs + 1), 99))
            appends = [tuple(row) for row in plan.block_appends.tolist()]
            if plan.starts:
                tables = [(slot, i, block) for slot in range(1, num_seqs + 1) for i, block in enumerate(prefix)]
                appends = tables + appends
            groups = int_rows([(0, num_seqs, 2)], NUM_GROUP_COLUMNS)
            driver.runner.launch(
                StepPlan(
                    step=plan.step,
                    starts=plan.starts,
                    block_appends=int_rows(appends, 3),
                    spans=plan.spans,
                    groups=groups,
                )
            )
            result = driver.runner.collect()
            for slot, token_id in zip(result.slots.tolist(), result.token_ids.tolist(), strict=True):
                driver.token_ids[slot].append(token_id)
        for slot in range(1, num_seqs + 1):
            driver.blocks[slot] = driver.blocks[slot][2:]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", GPU_CONFIGS)
def test_steps_compile_nothing_after_a_rehearsal(
    name: str, kv_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    folder = keep_binaries_in(tmp_path, torch.cuda.get_device_capability())
    config, device = GPU_CONFIGS[name], torch.device("cuda:0")
    kinds = StepKinds.of(config, GPU_LIMITS, dtype="bfloat16", kv_dtype=kv_dtype)
    compiled: list[str] = []
    warm(rehearsal_calls(kinds, device), folder, num_threads=8)
    before = list_binaries(tmp_path)[0].num_kernels
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["fn"].name)
    )
    workspace = Workspace(device)
    driver = Driver(random_runner(config, workspace, getattr(torch, kv_dtype)))
    for _ in range(2):
        run_all_sorts(driver)
    torch.cuda.synchronize()
    driver.runner.close()
    workspace.close()
    assert (compiled, list_binaries(tmp_path)[0].num_kernels - before) == ([], 0)
