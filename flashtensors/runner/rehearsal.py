"""Every kind of step that a model's runner may take, run over weights that are nothing, so that its kernels compile.

A kernel is compiled again for other constants, dtypes and strides, and for sizes that are 1 or a multiple of 16. Only
real steps know all of these, so they are taken here: over all buckets of rows and of sequences, with a layer of each
kind and the last one, whose MLP has rows of its own. All weights are one piece of memory as large as the largest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import msgspec
import torch

from ..checkpoint.architecture import ModelConfig
from ..models.registry import Model, build_model, weight_layout
from ..request import SamplingParams
from ..step import NUM_APPEND_COLUMNS, NUM_GROUP_COLUMNS, NUM_SPAN_COLUMNS, RunnerLimits, SlotStart, StepPlan, int_rows
from .buckets import row_buckets, seq_buckets
from .make import make_runner
from .workspace import Workspace

_PLAIN = SamplingParams(temperature=0.7)
_NUCLEUS = SamplingParams(temperature=0.7, top_p=0.9)
_CHANGED = SamplingParams(temperature=0.7, presence_penalty=0.5, logit_bias={0: 1.0}, min_tokens=2)

_NUM_BLOCKS = 4
"""Of the KV cache: all sequences read and write the same ones."""

_PROMPT_TOKENS = 33
"""Of the one prompt in a step that also decodes: more than decode tiles take."""


class StepKinds(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which kernels a model's steps launch; models that agree in it share them."""

    config: ModelConfig
    """With a layer of each kind, and nothing that only the host reads."""
    dtype: str
    kv_dtype: str
    limits: RunnerLimits

    @classmethod
    def of(cls, config: ModelConfig, limits: RunnerLimits, *, dtype: str, kv_dtype: str) -> Self:
        """Those of a model; dtypes are torch's names."""
        return cls(
            config=_shortened(config),
            dtype=dtype,
            kv_dtype=kv_dtype,
            limits=msgspec.structs.replace(limits, num_blocks=_NUM_BLOCKS),
        )


def rehearsal_calls(kinds: StepKinds, device: torch.device) -> list[Callable[[], None]]:
    """Calls that take the steps, for `kernels.binaries.warm`; each has a runner of its own, so they may run at once."""
    model = _hollow_model(kinds, device)
    return [functools.partial(_rehearse, kinds, model, device, list(scenes)) for scenes in _scenes(kinds.limits)]


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """A step of as many sequences as asked for, of which the first have all the tokens that one each leaves.

    Where all have one, another step follows: who begins with one token is not yet a decode.
    """

    num_seqs: int
    num_tokens: int
    sampling: SamplingParams = _PLAIN
    has_groups: bool = False

    def plans(self, step: int, limits: RunnerLimits) -> list[StepPlan]:
        """The steps, from this number on; all sequences begin in the first."""
        begin = limits.block_size * self.has_groups
        rest, sizes = self.num_tokens - self.num_seqs, list[int]()
        for _ in range(self.num_seqs):
            sizes.append(1 + min(rest, _longest(limits) - begin - 1))
            rest -= sizes[-1] - 1
        appends = [
            (slot, index, index % _NUM_BLOCKS)
            for slot, size in enumerate(sizes)
            for index in range(-(-(begin + size) // limits.block_size))
        ]
        first = StepPlan(
            step=step,
            starts=[self._start(slot, begin + size) for slot, size in enumerate(sizes)],
            block_appends=int_rows(appends, NUM_APPEND_COLUMNS),
            spans=int_rows([(slot, begin, size, 1) for slot, size in enumerate(sizes)], NUM_SPAN_COLUMNS),
            groups=int_rows([(0, self.num_seqs, 1)] if self.has_groups else [], NUM_GROUP_COLUMNS),
        )
        if self.num_tokens > self.num_seqs:
            return [first]
        spans = first.spans + int_rows([(0, 1, 0, 0)], NUM_SPAN_COLUMNS)
        return [first, StepPlan(step=step + 1, spans=spans, groups=first.groups)]

    def _start(self, slot: int, num_tokens: int) -> SlotStart:
        return SlotStart(
            slot=slot,
            token_ids=[0] * num_tokens,
            num_prompt_tokens=num_tokens,
            sampling=self.sampling,
            seed=slot,
            stop_token_ids=[0],
        )


def _scenes(limits: RunnerLimits) -> Iterator[Iterable[_Scene]]:
    """Scenes in parts that launch different kernels, as far as that is possible."""
    seqs, rows = seq_buckets(limits), row_buckets(limits)
    yield [_Scene(num_seqs=n, num_tokens=n) for n in seqs]
    yield [_Scene(num_seqs=n, num_tokens=n, sampling=_NUCLEUS) for n in seqs]
    longest = _longest(limits)
    prompts = [_Scene(num_seqs=-(-n // longest), num_tokens=n) for n in rows if n > 1]
    yield [scene for scene in prompts if scene.num_seqs <= limits.max_slots]
    mixed = [n for n in seqs if n + _PROMPT_TOKENS - 1 <= limits.max_tokens_per_step and longest >= _PROMPT_TOKENS]
    yield [_Scene(num_seqs=n, num_tokens=n + _PROMPT_TOKENS - 1) for n in mixed]
    if limits.group_min_members and limits.block_size + _PROMPT_TOKENS <= longest:
        yield [_Scene(num_seqs=n, num_tokens=n, has_groups=True) for n in seqs]
        yield [_Scene(num_seqs=n, num_tokens=n + _PROMPT_TOKENS - 1, has_groups=True) for n in mixed]
    yield [
        _Scene(num_seqs=n, num_tokens=n, sampling=msgspec.structs.replace(_CHANGED, logprobs=num_logprobs))
        for n in (1, 3, 16)
        for num_logprobs in (None, 0, 1, 3)
        if n <= seqs[-1]
    ]


def _longest(limits: RunnerLimits) -> int:
    """Most tokens of a sequence, so that there is room for the one that it draws."""
    return limits.max_model_len - 1


def _rehearse(kinds: StepKinds, model: Model, device: torch.device, scenes: list[_Scene]) -> None:
    workspace = Workspace(device)
    with make_runner(
        model,
        kinds.config,
        limits=kinds.limits,
        device=device,
        dtype=getattr(torch, kinds.dtype),
        kv_dtype=getattr(torch, kinds.kv_dtype),
        workspace=workspace,
        enforce_eager=True,
    ) as runner:
        step = 0
        for scene in scenes:
            for plan in scene.plans(step, runner.limits):
                runner.launch(plan)
                runner.collect()
                step += 1
    workspace.close()


def _hollow_model(kinds: StepKinds, device: torch.device) -> Model:
    dtype, weights = getattr(torch, kinds.dtype), weight_layout(kinds.config).weights
    dtypes = [dtype if weight.dtype is None else getattr(torch, weight.dtype) for weight in weights]
    sizes = [weight.num_elements * dtype.itemsize for weight, dtype in zip(weights, dtypes, strict=True)]
    nothing = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    views = {
        weight.name: nothing[:num_bytes].view(dtype).view(weight.shape)
        for weight, dtype, num_bytes in zip(weights, dtypes, sizes, strict=True)
    }
    return build_model(kinds.config, views, dtype=dtype)


def _shortened(config: ModelConfig) -> ModelConfig:
    """The first layer of each kind, and the last one."""
    sliding = config.sliding_layers or (False,) * config.num_hidden_layers
    sparse = config.experts.layers if config.experts is not None else sliding
    kinds = list(zip(sliding, sparse, strict=True))
    chosen = [*sorted(kinds.index(kind) for kind in set(kinds)), config.num_hidden_layers - 1]
    experts = config.experts
    if experts is not None:
        experts = msgspec.structs.replace(experts, layers=tuple(sparse[layer] for layer in chosen))
    return msgspec.structs.replace(
        config,
        num_hidden_layers=len(chosen),
        sliding_layers=tuple(sliding[layer] for layer in chosen) if config.sliding_layers else (),
        experts=experts,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(),
        weight_prefix="",
    )
