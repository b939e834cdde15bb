"""The runner with real, tiny models against a plain loop that recomputes the whole sequence for every token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.errors import CapacityError
from flashtensors.kernels.attention.batch import AttentionBatch
from flashtensors.memory.arena import Arena
from flashtensors.models.registry import Model
from flashtensors.request import SamplingParams
from flashtensors.runner.kv_layout import KvLayout, kv_block_bytes
from flashtensors.runner.torch_runner import NOT_FINITE, TorchRunner
from flashtensors.step import (
    RunnerLimits,
)

from .driver import CONFIGS, GREEDY, LLAMA, VOCAB_SIZE, Driver, make_model, prompt_of

BLOCK_SIZE = 4
LIMITS = RunnerLimits(num_blocks=80, block_size=BLOCK_SIZE, max_slots=6, max_tokens_per_step=64, max_model_len=48)


def full_logits(model: Model, config: ModelConfig, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits after the last token, from one prefill of everything into caches of its own."""
    num_tokens = len(token_ids)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    shape = (num_blocks, config.num_key_value_heads, BLOCK_SIZE, config.head_dim)
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    batch = AttentionBatch(
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32),
        kv_lengths=torch.tensor([num_tokens], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        slot_mapping=torch.arange(num_tokens),
        spans=((0, num_tokens, num_tokens),),
    )
    with torch.inference_mode():
        tokens = torch.tensor(token_ids)
        return model.forward(tokens, torch.arange(num_tokens), caches, batch, torch.tensor([num_tokens - 1]))[0]


def make_driver(config: ModelConfig, *, limits: RunnerLimits = LIMITS, seed: int = 0) -> Driver:
    device = torch.device("cpu")
    runner = TorchRunner(make_model(config), config, limits=limits, device=device, dtype=torch.float32)
    return Driver(runner, seed)


def greedy_answer(model: Model, config: ModelConfig, prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + num_tokens:
        token_ids.append(int(full_logits(model, config, token_ids).argmax()))
    return token_ids


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_mixed_chunked_batches_equal_the_plain_loop(config: ModelConfig):
    model = make_model(config)
    driver = make_driver(config)
    prompts = {slot: prompt_of(length, slot) for slot, length in enumerate((1, 3, 4, 9, 17, 30))}
    for slot, prompt in prompts.items():
        driver.start(slot, prompt, GREEDY)
    driver.finish({slot: len(prompt) + 8 for slot, prompt in prompts.items()})
    for slot, prompt in prompts.items():
        assert driver.token_ids[slot] == greedy_answer(model, config, prompt, 8)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_poison_in_free_blocks_and_reused_slots_never_shows(config: ModelConfig):
    model = make_model(config)
    driver = make_driver(config)
    lengths = (5, 16, 23)
    for tour in range(4):
        # Also behind the last token of blocks that are about to be used: nobody may read what was not written.
        for cache in (cache for layer in driver.runner.kv_caches for cache in layer):
            cache[driver.free] = torch.nan
        slot = tour % 2
        prompt = prompt_of(lengths[tour % 3], 50 + tour)
        driver.start(slot, prompt, GREEDY)
        driver.finish({slot: len(prompt) + 5})
        assert driver.token_ids[slot] == greedy_answer(model, config, prompt, 5)
    for cache in (cache for layer in driver.runner.kv_caches for cache in layer):
        cache[driver.free] = torch.nan
    prompts = {slot: prompt_of(length, slot) for slot, length in enumerate((2, 11, 19, 7))}
    for slot, prompt in prompts.items():
        driver.start(slot, prompt, GREEDY)
    driver.finish({slot: len(prompt) + 6 for slot, prompt in prompts.items()})
    for slot, prompt in prompts.items():
        assert driver.token_ids[slot] == greedy_answer(model, config, prompt, 6)


ZOO = [
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=1.2, top_k=7),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=0.7, min_p=0.05, top_p=0.95, top_k=30, repetition_penalty=1.3),
    SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.5, logit_bias={3: 4.0, 5: -100.0}),
    SamplingParams(temperature=1.0, min_p=0.1, frequency_penalty=-0.3, logprobs=3),
]


def test_a_batch_of_all_kinds_equals_each_alone():
    together = make_driver(LLAMA)
    prompts = [prompt_of(length, length) for length in (3, 8, 5, 13, 21, 2)]
    for slot, (prompt, sampling) in enumerate(zip(prompts, ZOO, strict=True)):
        together.start(slot, prompt, sampling, seed=1000 + slot)
    together.finish({slot: len(prompt) + 10 for slot, prompt in enumerate(prompts)})
    for slot, (prompt, sampling) in enumerate(zip(prompts, ZOO, strict=True)):
        alone = make_driver(LLAMA, seed=slot)
        alone.start(5 - slot, prompt, sampling, seed=1000 + slot)
        alone.finish({5 - slot: len(prompt) + 10})
        assert alone.token_ids[5 - slot] == together.token_ids[slot]


def test_a_sequence_that_comes_back_draws_on_as_if_it_had_stayed():
    sampling = SamplingParams(temperature=1.1, frequency_penalty=0.4, min_tokens=9)
    stayed, prompt = make_driver(LLAMA), prompt_of(6, 1)
    stayed.start(0, prompt, sampling, seed=-5, stop_token_ids=[1, 2])
    stayed.finish({0: 20})
    returned = make_driver(LLAMA, seed=3)
    returned.start(2, stayed.token_ids[0][:13], sampling, seed=-5, num_prompt_tokens=6, stop_token_ids=[1, 2])
    returned.finish({2: 20})
    assert returned.token_ids[2] == stayed.token_ids[0]


def test_the_seed_is_64_bits_with_or_without_a_sign():
    answers = []
    for seed in (-1, 2**64 - 1):
        driver = make_driver(LLAMA)
        driver.start(0, [1, 2, 3], SamplingParams(), seed=seed)
        driver.finish({0: 15})
        answers.append(driver.token_ids[0])
    assert answers[0] == answers[1]


def test_stop_tokens_wait_for_min_tokens():
    model, prompt = make_model(LLAMA), prompt_of(5, 2)
    greedy = greedy_answer(model, LLAMA, prompt, 1)[-1]
    driver = make_driver(LLAMA)
    driver.start(0, prompt, SamplingParams(temperature=0, min_tokens=1), stop_token_ids=[greedy, VOCAB_SIZE + 5])
    second_likeliest = full_logits(model, LLAMA, prompt).topk(2)[1][1].item()
    assert driver.step({0: 5}).token_ids.tolist() == [second_likeliest]
    next_greedy = full_logits(model, LLAMA, driver.token_ids[0]).argmax().item()
    driver.start(
        1,
        driver.token_ids[0],
        SamplingParams(temperature=0, min_tokens=1),
        num_prompt_tokens=5,
        stop_token_ids=[next_greedy],
    )
    result = driver.step({1: 6})
    assert (result.token_ids.tolist(), result.is_stopped.tolist()) == ([next_greedy], [True])


def test_logprobs_are_after_bias_and_penalties_before_temperature():
    model, prompt = make_model(LLAMA), prompt_of(7, 3)
    driver = make_driver(LLAMA)
    sampling = SamplingParams(temperature=0.5, logprobs=4, logit_bias={11: 2.5}, repetition_penalty=1.5)
    driver.start(0, prompt, sampling, seed=8)
    driver.start(3, prompt, SamplingParams(temperature=0))
    driver.start(1, prompt, SamplingParams(temperature=0, logprobs=0))
    result = driver.step({0: 7, 3: 7, 1: 7})
    logits = full_logits(model, LLAMA, prompt)
    plain = torch.log_softmax(logits, -1)
    logits = logits.clone()
    logits[11] += 2.5
    for token in set(prompt):
        logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
    expected = torch.log_softmax(logits, -1)
    assert result.logprobs.keys() == {0, 1}
    assert result.logprobs[0].logprob == pytest.approx(expected[result.token_ids[0]].item(), abs=1e-4)
    values, ids = expected.topk(4)
    assert [token_id for token_id, _ in result.logprobs[0].top] == ids.tolist()
    assert [logprob for _, logprob in result.logprobs[0].top] == pytest.approx(values.tolist(), abs=1e-4)
    assert result.logprobs[1].logprob == pytest.approx(plain.max().item(), abs=1e-4)
    assert result.logprobs[1].top == []


def test_a_step_without_samples_draws_nothing():
    driver = make_driver(LLAMA)
    driver.start(0, prompt_of(9, 0), SamplingParams(logprobs=2))
    result = driver.step({0: 4})
    assert (result.step, len(result.slots), len(result.token_ids), len(result.is_stopped)) == (0, 0, 0, 0)
    assert result.logprobs == {}


def test_logits_that_are_not_finite_fail_their_sequence_alone():
    driver = make_driver(LLAMA)
    driver.start(0, [1, 2, 3], SamplingParams(temperature=1.0, logprobs=1))
    driver.start(1, [4, 5, 6, 7, 8], GREEDY)
    driver.step({0: 2, 1: 5})
    driver.runner.kv_caches[0][1][driver.blocks[0]] = torch.nan
    result = driver.step({0: 1, 1: 1})
    assert result.failed == {0: NOT_FINITE}
    assert result.token_ids[0] == 0
    assert driver.token_ids[1] == greedy_answer(make_model(LLAMA), LLAMA, [4, 5, 6, 7, 8], 2)


class ExactModel:
    """Its next token is a function of all tokens that the cache holds, without rounding; it checks its arguments."""

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        kv_caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
        batch: AttentionBatch,
        sample_rows_S: torch.Tensor,
        **_: object,
    ) -> torch.Tensor:
        """Logits that are 1 at the sum of (position + 1) * token over the sequence, modulo the vocabulary."""
        ((k_cache, _),) = kv_caches
        entries = k_cache.view(-1)
        entries[batch.slot_mapping] = (token_ids_T * (positions_T + 1)).float()
        logits = torch.zeros(len(sample_rows_S), VOCAB_SIZE)
        drawn = 0
        for index, (query_start, num_tokens, kv_length) in enumerate(batch.spans):
            assert batch.query_starts[index : index + 2].tolist() == [query_start, query_start + num_tokens]
            assert batch.kv_lengths[index] == kv_length
            rows = slice(query_start, query_start + num_tokens)
            assert positions_T[rows].tolist() == list(range(kv_length - num_tokens, kv_length))
            positions = torch.arange(kv_length)
            where = batch.block_tables[index, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            assert where[-num_tokens:].tolist() == batch.slot_mapping[rows].tolist()
            if query_start + num_tokens - 1 in sample_rows_S.tolist():
                logits[drawn, int(entries[where].sum()) % VOCAB_SIZE] = 1.0
                drawn += 1
        return logits


def test_steps_in_flight_read_what_earlier_ones_drew():
    config = ModelConfig(
        **{
            **{name: getattr(LLAMA, name) for name in LLAMA.__struct_fields__},
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "head_dim": 1,
        }
    )
    limits = RunnerLimits(
        num_blocks=64,
        block_size=BLOCK_SIZE,
        max_slots=4,
        max_tokens_per_step=64,
        max_model_len=40,
        max_steps_in_flight=3,
    )
    with TorchRunner(ExactModel(), config, limits=limits, device=torch.device("cpu"), dtype=torch.float32) as runner:
        driver = Driver(runner)
        prompts = {slot: prompt_of(3 + slot, slot) for slot in range(4)}
        for slot, prompt in prompts.items():
            driver.start(slot, prompt, GREEDY)
        drawn: dict[int, list[int]] = {slot: [] for slot in prompts}
        for step in range(12):
            runner.launch(driver.plan(dict.fromkeys(prompts, 99)))
            for token_ids in driver.token_ids.values():
                token_ids.append(-1)  # the driver does not know the token yet, and need not
            if step >= 2:
                result = runner.collect()
                assert result.step == step - 2
                for slot, token_id in zip(result.slots.tolist(), result.token_ids.tolist(), strict=True):
                    drawn[slot].append(token_id)
    for slot, prompt in prompts.items():
        expected = list(prompt)
        for _ in range(10):
            expected.append(sum((position + 1) * token for position, token in enumerate(expected)) % VOCAB_SIZE)
        assert drawn[slot] == expected[len(prompt) :]


def test_kv_caches_take_what_was_promised():
    driver = make_driver(LLAMA)
    num_bytes = sum(cache.nbytes for layer in driver.runner.kv_caches for cache in layer)
    assert num_bytes == kv_block_bytes(LLAMA, BLOCK_SIZE, torch.float32) * LIMITS.num_blocks
    assert driver.runner.kv_caches[0][0].shape == (80, 2, BLOCK_SIZE, 8)


def test_no_room_for_the_caches():
    limits = RunnerLimits(num_blocks=2**50, block_size=BLOCK_SIZE, max_slots=1, max_tokens_per_step=8, max_model_len=8)
    with pytest.raises(CapacityError, match="no room"):
        TorchRunner(make_model(LLAMA), LLAMA, limits=limits, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_device_with_two_steps_in_flight_equals_the_host(config: ModelConfig):
    limits = RunnerLimits(
        num_blocks=80,
        block_size=BLOCK_SIZE,
        max_slots=6,
        max_tokens_per_step=64,
        max_model_len=48,
        max_steps_in_flight=2,
    )
    device = torch.device("cuda")
    with TorchRunner(make_model(config, "cuda"), config, limits=limits, device=device, dtype=torch.float32) as runner:
        host, driver = make_driver(config), Driver(runner)
        samplings = [GREEDY, ZOO[4], *ZOO[:4]]
        for slot, sampling in enumerate(samplings):
            for either in (host, driver):
                either.start(slot, prompt_of(4 + slot, slot), sampling, seed=slot)
        slots = dict.fromkeys(range(6), 99)
        for _ in range(12):
            host.step(slots)
        results = []
        for step in range(12):
            runner.launch(driver.plan(slots))
            for token_ids in driver.token_ids.values():
                token_ids.append(-1)
            if step:
                results.append(runner.collect())
        results.append(runner.collect())
    for slot in slots:
        assert [result.token_ids[slot] for result in results] == host.token_ids[slot][4 + slot :]


def test_a_docked_arena_in_chunks_equals_a_cache_of_its_own():
    model, prompt = make_model(LLAMA), prompt_of(30, 1)
    layout = KvLayout(LLAMA, BLOCK_SIZE, torch.float32)
    arena = Arena.allocate(2 * layout.chunk_bytes)
    device = torch.device("cpu")
    with TorchRunner(model, LLAMA, limits=LIMITS, device=device, dtype=torch.float32, kv_arena=arena) as runner:
        asked: list[int | None] = []
        runner.dock(layout.num_blocks(arena.num_bytes), asked.append)
        driver = Driver(runner)
        assert len(driver.free) == 2 * layout.chunk_blocks
        driver.start(0, prompt, GREEDY)
        driver.step({0: 40})
        assert asked == [0, *range(LLAMA.num_hidden_layers), None]
        runner.gate_open()
        driver.finish({0: 40})
        assert asked == [0, *range(LLAMA.num_hidden_layers), None]
        assert driver.token_ids[0] == greedy_answer(model, LLAMA, prompt, 10)
    assert arena.bytes_B.numel() == arena.num_bytes  # borrowed, so still open
