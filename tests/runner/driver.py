"""Tiny models, and the least engine that can drive a runner over them."""

from __future__ import annotations

import random

import torch

from flashtensors.checkpoint.architecture import ModelConfig
from flashtensors.engine.runner_protocol import Runner
from flashtensors.models.registry import Model, build_model, weight_layout
from flashtensors.request import SamplingParams
from flashtensors.step import NUM_APPEND_COLUMNS, NUM_SPAN_COLUMNS, SlotStart, StepPlan, StepResult, int_rows

VOCAB_SIZE = 61
GREEDY = SamplingParams(temperature=0)

LLAMA = ModelConfig(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    dtype="float32",
)
GEMMA = ModelConfig(
    model_type="gemma3_text",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    rope_local_theta=1e4,
    tie_word_embeddings=True,
    hidden_act="gelu_pytorch_tanh",
    qk_norm=True,
    sliding_window=6,
    sliding_layers=(True, True, False),
    embedding_scale=32**0.5,
    dtype="float32",
)
CONFIGS = {"llama": LLAMA, "gemma": GEMMA}


def make_model(config: ModelConfig, device: str = "cpu") -> Model:
    generator = torch.Generator().manual_seed(0)
    weights = {
        weight.name: torch.randn(weight.shape, generator=generator).mul_(0.4).to(device)
        for weight in weight_layout(config).weights
    }
    return build_model(config, weights, dtype=torch.float32)


def prompt_of(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


class Driver:
    """The least an engine must do: hands out blocks at random and takes them back, numbers the steps."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        self.runner = runner
        self.random = random.Random(seed)
        self.free = list(range(runner.limits.num_blocks))
        self.blocks: dict[int, list[int]] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.num_steps = 0
        self._starts: list[SlotStart] = []

    def start(
        self, slot: int, token_ids: list[int], sampling: SamplingParams, *, seed: int = 0, **fields: object
    ) -> None:
        """Put a sequence into a slot; what the slot held before gives its blocks back."""
        self.free += self.blocks.pop(slot, [])
        self.random.shuffle(self.free)
        self.blocks[slot], self.token_ids[slot], self.computed[slot] = [], list(token_ids), 0
        defaults = {"num_prompt_tokens": len(token_ids), "stop_token_ids": []}
        start = SlotStart(slot=slot, token_ids=list(token_ids), sampling=sampling, seed=seed, **(defaults | fields))
        self._starts.append(start)

    def plan(self, chunks: dict[int, int]) -> StepPlan:
        """A step that computes at most so many tokens of each slot."""
        appends, spans = [], []
        for slot, most in chunks.items():
            begin, length = self.computed[slot], len(self.token_ids[slot])
            end = min(begin + most, length)
            missing = -(-end // self.runner.limits.block_size) - len(self.blocks[slot])
            if missing > 0:
                new, self.free = self.free[:missing], self.free[missing:]
                appends += [(slot, len(self.blocks[slot]) + i, block_id) for i, block_id in enumerate(new)]
                self.blocks[slot] += new
            spans.append((slot, begin, end - begin, int(end == length)))
            self.computed[slot] = end
        starts, self._starts = self._starts, []
        self.num_steps += 1
        return StepPlan(
            step=self.num_steps - 1,
            starts=starts,
            block_appends=int_rows(appends, NUM_APPEND_COLUMNS),
            spans=int_rows(spans, NUM_SPAN_COLUMNS),
        )

    def step(self, chunks: dict[int, int]) -> StepResult:
        """Run one step to its end."""
        self.runner.launch(self.plan(chunks))
        result = self.runner.collect()
        for slot, token_id in zip(result.slots.tolist(), result.token_ids.tolist(), strict=True):
            self.token_ids[slot].append(token_id)
        return result

    def finish(self, lengths: dict[int, int], *, longest_chunk: int = 7) -> None:
        """Random chunks of random slots until each is as long as asked for."""
        while waiting := [slot for slot, length in lengths.items() if len(self.token_ids[slot]) < length]:
            chosen = self.random.sample(waiting, self.random.randint(1, len(waiting)))
            self.step({slot: self.random.randint(1, longest_chunk) for slot in chosen})
