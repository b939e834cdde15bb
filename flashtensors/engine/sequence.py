"""One answer on its way from prompt to last token, and how a request becomes its answers."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import ContextTooLong, RequestError
from ..kvcache.prefix_cache import PrefixNode
from ..request import EngineRequest, SamplingParams
from ..step import RunnerLimits, SlotStart

PRIORITY_STRIDE = 1024
"""Later requests that one level of priority is worth; see `rank_of`."""

Rank = tuple[int, int, int]


class SequenceState(enum.Enum):
    """Where a sequence stands."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One answer to a prompt.

    Its length runs ahead of its known tokens: a step in flight that draws a token counts, though nobody here has
    seen the token yet.
    """

    request_id: str
    index: int
    rank: Rank
    """Order of service, lower first."""
    sampling: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    token_ids: list[int]
    """Known tokens: the prompt and what was generated."""
    num_prompt_tokens: int
    max_length: int
    """Tokens, prompt and answer, at which the answer ends."""

    state: SequenceState = SequenceState.WAITING
    num_pending: int = 0
    """Tokens drawn by steps in flight."""
    num_cached_tokens: int | None = None
    """Prompt tokens found in the prefix cache on first admission; None before."""
    has_reported: bool = False
    """Whether a delta of it was handed out."""
    refused_at: int = -1
    """`PrefixCache.num_releases` when blocks were last found wanting."""

    slot: int = -1
    """This and what follows have meaning only while the sequence runs."""
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    """Tokens whose keys and values are in the cache once every launched step is done."""
    prefix: PrefixNode | None = None
    """The longest prefix of this sequence in the prefix cache; None where it cannot be continued."""
    num_prefix_blocks: int = 0
    """Blocks that were found in the prefix cache or offered to it."""

    @property
    def length(self) -> int:
        """Tokens, known or in flight."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the next span may compute: 1 for a sequence that decodes."""
        return self.length - self.num_computed

    @property
    def is_drawn_out(self) -> bool:
        """Whether steps in flight draw its last token, so that there is nothing more to compute."""
        return self.length >= self.max_length

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

    def finish_reason(self) -> str | None:
        """Why the newest token ends the answer: `stop`, `length`, or None when it does not."""
        num_generated = len(self.token_ids) - self.num_prompt_tokens
        if self.token_ids[-1] in self.stop_token_ids and num_generated > self.sampling.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_length else None


def rank_of(arrival: int, priority: int, index: int) -> Rank:
    """Order of service: first come, first served, where a level of priority is worth `PRIORITY_STRIDE` arrivals.

    A request of priority p ranks as if it had come p × 1024 requests later. Requests of priority q < p overtake it
    only while they come less than (p - q) × 1024 requests after it, so nobody waits for ever.
    """
    return (arrival + priority * PRIORITY_STRIDE, arrival, index)


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
    request: EngineRequest, stop_token_ids: Iterable[int], *, max_length: int, arrival: int, seed: int
) -> list[Sequence]:
    """The `n` answers of a request, ready to wait.

    Args:
        request: What was asked.
        stop_token_ids: The model's end-of-sequence ids; they count unless `sampling.ignore_eos`.
        max_length: From `find_max_length`.
        arrival: Counts the requests.
        seed: Used where the request fixes none.
    """
    sampling = request.sampling
    stops = frozenset(sampling.stop_token_ids).union(() if sampling.ignore_eos else stop_token_ids)
    return [
        Sequence(
            request_id=request.request_id,
            index=index,
            rank=rank_of(arrival, request.priority, index),
            sampling=sampling,
            seed=derive_seed(seed if sampling.seed is None else sampling.seed, index),
            stop_token_ids=stops,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            max_length=max_length,
        )
        for index in range(sampling.n)
    ]
