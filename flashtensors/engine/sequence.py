"""One answer on its way from prompt to last token, and how a request becomes its answers."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import ContextTooLong, RequestError
from ..kvcache.prefix_cache import PrefixNode
from ..request import EngineRequest, SamplingParams, TokenLogprobs
from ..step import RunnerLimits, SlotStart
from .turns import Rank, Turn


class SequenceState(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One answer to a prompt. While it runs, what changes with every step is in `Batch`, by its slot."""

    request_id: str
    index: int
    rank: Rank
    """Order of service, lower first."""
    priority: int
    sampling: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    token_ids: list[int]
    """Known tokens: the prompt and what was generated; while it runs, the latest may still lie in the batch."""
    num_prompt_tokens: int
    max_length: int
    """Tokens, prompt and answer, at which the answer ends."""
    wants_stream: bool
    """Whether the caller reads the answer before its end."""

    state: SequenceState = SequenceState.WAITING
    num_pending: int = 0
    """While it waits: tokens drawn by steps in flight, from before it gave way."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache on first admission; None before."""
    has_reported: bool = False
    """Whether a delta of it was handed out."""
    num_reported: int = 0
    """Generated tokens handed out."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of generated tokens that are not handed out, where asked for."""
    refused_at: int = -1
    """`PrefixCache.num_changes` when room was last found wanting."""

    slot: int = -1
    """This and what follows have meaning only while the sequence runs."""
    prefix: PrefixNode | None = None
    """The longest prefix of this sequence in the prefix cache; None where it cannot be continued."""
    num_prefix_blocks: int = 0
    """Blocks that were found in the prefix cache or offered to it."""

    @property
    def num_generated(self) -> int:
        """Tokens of the answer in `token_ids`."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_unsent(self) -> int:
        """Tokens of the answer in `token_ids` that were not handed out."""
        return self.num_generated - self.num_reported

    @property
    def is_streamed(self) -> bool:
        """Whether tokens are wanted as they come: by the caller, or to find stop strings in them."""
        return self.wants_stream or bool(self.sampling.stop)

    @property
    def is_batch(self) -> bool:
        """Whether nobody waits for its first token."""
        return self.priority > 0

    @property
    def can_stop(self) -> bool:
        """Whether anything but its length may end the answer."""
        return bool(self.stop_token_ids or self.sampling.stop)

    def slot_start(self) -> SlotStart:
        """What the runner has to know of this sequence when it enters its slot."""
        return SlotStart(
            slot=self.slot,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling,
            seed=self.seed,
            stop_token_ids=sorted(self.stop_token_ids),
        )


def derive_seed(seed: int, index: int) -> int:
    """Seed of answer `index`: output number `index` of SplitMix64 started at `seed` (Steele et al., 2014).

    Unsigned, 64 bits. For one `seed`, different answers have different seeds.
    """
    mask = 2**64 - 1
    mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def find_max_length(request: EngineRequest, limits: RunnerLimits) -> int:
    """Tokens, prompt and answer, at which the answers to `request` end.

    Raises:
        RequestError: The prompt is empty.
        ContextTooLong: Prompt and answer exceed the context: the model's, or the whole KV cache where that is less.
    """
    num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
    capacity = limits.num_blocks * limits.block_size
    context = min(limits.max_model_len, capacity)
    bound = "the model's context" if context == limits.max_model_len else "the KV cache's capacity"
    if num_prompt_tokens == 0:
        raise RequestError("the prompt has no tokens; send at least one", param="prompt")
    if num_prompt_tokens >= context:
        raise ContextTooLong(
            f"the prompt has {num_prompt_tokens} tokens, but {bound} is {context} tokens and the answer needs at "
            f"least 1 of them; shorten the prompt to {context - 1} tokens",
            param="prompt",
        )
    if max_tokens is None:
        return context
    if num_prompt_tokens + max_tokens > context:
        raise ContextTooLong(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}, together "
            f"{num_prompt_tokens + max_tokens}, but {bound} is {context} tokens; "
            f"set max_tokens to {context - num_prompt_tokens} or less, or shorten the prompt",
            param="max_tokens",
        )
    return num_prompt_tokens + max_tokens


def make_sequences(
    request: EngineRequest, stop_token_ids: Iterable[int], *, max_length: int, turn: Turn, seed: int
) -> list[Sequence]:
    """The `n` answers of a request, ready to wait.

    Args:
        request: What was asked.
        stop_token_ids: The model's end-of-sequence ids; they count unless `sampling.ignore_eos`.
        max_length: From `find_max_length`.
        turn: When the request is served.
        seed: Used where the request fixes none.
    """
    sampling = request.sampling
    stops = frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else stop_token_ids)
    return [
        Sequence(
            request_id=request.request_id,
            index=index,
            rank=(*turn, index),
            priority=request.priority,
            sampling=sampling,
            seed=derive_seed(seed if sampling.seed is None else sampling.seed, index),
            stop_token_ids=stops,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            max_length=max_length,
            wants_stream=request.is_streamed,
        )
        for index in range(sampling.n)
    ]
