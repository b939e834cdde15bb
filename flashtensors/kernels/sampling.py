"""Choosing tokens from logits: addends, penalties, truncation, counter-based draws, logprobs.

For one row of logits `l`, in this order:

    l_v += addend_v                                          logit bias; -inf masks a token
    l_v  = l_v / r if l_v > 0 else l_v * r                   v in prompt or answer; r: repetition penalty (CTRL, 2019)
    l_v -= frequency * count_v + presence * [count_v > 0]    count_v: times that v is in the answer
    w_v  = exp((l_v - max l) / temperature)
    keep the k largest; of those the fewest that hold top_p of their mass; of those the ones with w_v >= min_p
    draw: the first kept v, in order, whose cumulative weight exceeds u * (weight of all kept)

`u` is a hash of (seed, position), so a draw depends on nothing but the seed, the position and the row's own logits.
Rows that truncate go through their tokens likeliest first, equal ones by id; the others by id, without a sort.

Shapes: S rows that sample, R rows of them, V vocabulary, K candidates, L tokens of the longest sequence, N addends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_TEMPERATURE = 1e-30
_FIRST_CANDIDATES = 512
"""Candidates that a row with top-p looks at before it sorts more; their mass nearly always reaches top_p."""
_TIE_SLACK = 64
"""Candidates beyond k, so that tokens equal to the k-th are seldom out of sight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addends:
    """What is added to single logits; entries for the same logit add up."""

    rows_N: Tensor
    token_ids_N: Tensor
    values_N: Tensor
    """float32; -inf takes the token out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Penalties of R rows, and the tokens they count. Factors are float32 [R]."""

    rows_R: Tensor
    token_ids_RL: Tensor
    """int64: prompt and answer; anything valid beyond `num_tokens_R`."""
    num_prompt_tokens_R: Tensor
    num_tokens_R: Tensor
    repetition_R: Tensor
    presence_R: Tensor
    frequency_R: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How R rows draw at random."""

    rows_R: Tensor
    temperature_R: Tensor
    """float32, > 0."""
    top_k_R: Tensor
    """int64; 0 keeps all."""
    top_p_R: Tensor
    """float64 in (0, 1]."""
    min_p_R: Tensor
    """float32 in [0, 1]."""
    seed_R: Tensor
    """int64."""
    position_R: Tensor
    """int64: of the token that is drawn, in its sequence."""
    num_candidates: int
    """Candidates that suffice for most rows, known to the host; 0: the rows neither use top-k nor top-p."""

    def select(self, index_R: Tensor, num_candidates: int) -> Draws:
        """The rows at `index_R`."""
        fields = ("rows_R", "temperature_R", "top_k_R", "top_p_R", "min_p_R", "seed_R", "position_R")
        return Draws(**{name: getattr(self, name)[index_R] for name in fields}, num_candidates=num_candidates)


def suggest_num_candidates(top_k: list[int]) -> int:
    """`Draws.num_candidates` for rows with these top-k settings, all of which truncate."""
    return max(max(top_k) + _TIE_SLACK, _FIRST_CANDIDATES if 0 in top_k else 0)


def adjust_logits(logits_SV: Tensor, addends: Addends | None, penalties: Penalties | None) -> None:
    """Apply addends, then penalties, to float32 `logits_SV` in place."""
    if addends is not None:
        logits_SV.index_put_((addends.rows_N, addends.token_ids_N), addends.values_N, accumulate=True)
    if penalties is not None:
        logits_SV[penalties.rows_R] = _penalise(logits_SV[penalties.rows_R], penalties)


def sample(logits_SV: Tensor, draws: list[Draws]) -> tuple[Tensor, Tensor]:
    """Choose a token for each row: as `draws` say, and greedily, the first largest logit, for rows in none of them.

    Returns:
        int64 [S] token ids, and bool [S]: False where the largest logit is not a finite number, so that the row's
        token means nothing.
    """
    token_ids_S = logits_SV.argmax(-1)
    peak_S = logits_SV.gather(1, token_ids_S[:, None]).squeeze(1)
    for group in draws:
        is_everything = len(group.rows_R) == len(logits_SV)  # rows are unique and in order
        logits_RV = logits_SV if is_everything else logits_SV[group.rows_R]
        scaled_RV = (logits_RV - peak_S[group.rows_R, None]) / group.temperature_R.clamp(min=_MIN_TEMPERATURE)[:, None]
        weights_RV = scaled_RV.exp_()
        if group.num_candidates == 0:
            kept_RV = weights_RV.where(weights_RV >= group.min_p_R[:, None], 0.0)
            token_ids_R = _pick(kept_RV.cumsum(-1, dtype=torch.float64), uniform(group.seed_R, group.position_R))
        else:
            mass_R = weights_RV.cumsum(-1, dtype=torch.float64)[:, -1]
            token_ids_R = _draw_truncated(logits_RV, weights_RV, mass_R, group)
        token_ids_S[group.rows_R] = token_ids_R
    return token_ids_S, peak_S.isfinite()


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural-log probabilities of the chosen tokens, and ids and logprobs `[R, num_top]` of the likeliest."""
    normaliser_R1 = logits_RV.logsumexp(-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, token_ids_R[:, None]) - normaliser_R1
    top_RK, top_ids_RK = logits_RV.topk(num_top)
    return chosen_R1.squeeze(1), top_ids_RK, top_RK - normaliser_R1


def uniform(seed_R: Tensor, position_R: Tensor) -> Tensor:
    """float64 [R] in [0, 1) with 52 random bits: SplitMix64 (Steele, Lea, Flood 2014) at a counter.

    The stream of a seed is the generator started at the seed's own hash, and `position` counts in it: neighbouring
    seeds have unrelated streams, and any position is reached at once.
    """
    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    hashed_R = _mix64(_mix64(seed_R + golden) + (position_R + 1) * golden)
    return _shift_right(hashed_R, 12).to(torch.float64) * 2.0**-52


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, num_bits: int) -> Tensor:
    """A logical shift; torch's own keeps the sign."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _penalise(logits_RV: Tensor, penalties: Penalties) -> Tensor:
    """Penalised logits; only those of tokens that occur are touched, each with the same value at every occurrence."""
    position_L = torch.arange(penalties.token_ids_RL.shape[1], device=logits_RV.device)
    last_R1 = penalties.num_tokens_R[:, None] - 1
    # Padding repeats the last token, whose new value is then merely written again.
    token_ids_RL = penalties.token_ids_RL.gather(1, position_L.minimum(last_R1))
    is_answer_RL = (position_L >= penalties.num_prompt_tokens_R[:, None]) & (position_L <= last_R1)
    count_RV = torch.zeros_like(logits_RV).scatter_add_(1, token_ids_RL, is_answer_RL.to(logits_RV.dtype))
    count_RL = count_RV.gather(1, token_ids_RL)
    value_RL = logits_RV.gather(1, token_ids_RL)
    repetition_R1 = penalties.repetition_R[:, None]
    value_RL = torch.where(value_RL > 0, value_RL / repetition_R1, value_RL * repetition_R1)
    value_RL -= penalties.frequency_R[:, None] * count_RL + penalties.presence_R[:, None] * (count_RL > 0)
    return logits_RV.scatter(1, token_ids_RL, value_RL)


def _draw_truncated(logits_RV: Tensor, weights_RV: Tensor, mass_R: Tensor, draws: Draws) -> Tensor:
    """Draw with top-k and top-p among the likeliest candidates, and again among more where those did not suffice."""
    vocab_size = logits_RV.shape[1]
    # Looking whether candidates suffice waits for the device, so a GPU sorts everything at once.
    num_candidates = min(draws.num_candidates, vocab_size) if logits_RV.device.type == "cpu" else vocab_size
    candidates_RK, num_certain_R = _find_candidates(logits_RV, num_candidates)
    weights_RK = weights_RV.gather(1, candidates_RK)
    num_kept_R, cumulative_RK = _truncate(weights_RK, mass_R, draws)
    cumulative_RK = cumulative_RK.minimum(cumulative_RK.gather(1, num_kept_R[:, None] - 1))
    picked_R = _pick(cumulative_RK, uniform(draws.seed_R, draws.position_R))
    token_ids_R = candidates_RK.gather(1, picked_R[:, None]).squeeze(1)
    if num_candidates < vocab_size:
        rest = (num_kept_R > num_certain_R).nonzero().squeeze(1)
        if len(rest):
            more = draws.select(rest, 16 * num_candidates)
            token_ids_R[rest] = _draw_truncated(logits_RV[rest], weights_RV[rest], mass_R[rest], more)
    return token_ids_R


def _find_candidates(logits_RV: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Ids `[R, K]` of the likeliest tokens, equal ones by id, and how many are surely the first of all V."""
    vocab_size = logits_RV.shape[1]
    if num_candidates == vocab_size:
        ids_RK = torch.sort(logits_RV, dim=-1, descending=True, stable=True)[1]
        return ids_RK, torch.full_like(ids_RK[:, 0], vocab_size)
    ids_RK = logits_RV.topk(num_candidates, sorted=False)[1].sort(-1)[0]
    values_RK, order_RK = torch.sort(logits_RV.gather(1, ids_RK), dim=-1, descending=True, stable=True)
    # Tokens equal to the last candidate may have been left out.
    return ids_RK.gather(1, order_RK), (values_RK > values_RK[:, -1:]).sum(-1)


def _truncate(weights_RK: Tensor, mass_R: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """How many of the sorted candidates each row keeps (at least 1), and their cumulative weights in float64."""
    num_candidates = weights_RK.shape[1]
    rank_K = torch.arange(num_candidates, device=weights_RK.device)
    cumulative_RK = weights_RK.cumsum(-1, dtype=torch.float64)
    has_top_k_R = (draws.top_k_R > 0) & (draws.top_k_R <= num_candidates)
    top_k_R = draws.top_k_R.where(has_top_k_R, num_candidates)
    mass_R = cumulative_RK.gather(1, top_k_R[:, None] - 1).squeeze(1).where(has_top_k_R, mass_R)
    before_RK = cumulative_RK - weights_RK
    is_kept_RK = (
        (rank_K < top_k_R[:, None])
        & ((before_RK < (draws.top_p_R * mass_R)[:, None]) | (draws.top_p_R >= 1.0)[:, None])
        & (weights_RK >= draws.min_p_R[:, None])
    )
    return is_kept_RK.sum(-1).clamp(min=1), cumulative_RK


def _pick(cumulative_RK: Tensor, uniform_R: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds `uniform` times the whole; any index for rows of NaN."""
    target_R = uniform_R * cumulative_RK[:, -1]
    picked_R = torch.searchsorted(cumulative_RK, target_R[:, None], right=True).squeeze(1)
    return picked_R.clamp(max=cumulative_RK.shape[1] - 1)
