"""Choosing tokens from logits: greedy, or at random with truncation; and logprobs.

For one row of logits `l`:

    w_v  = exp((l_v - max l) / temperature)
    keep the k largest; of those the fewest that hold top_p of their mass; of those the ones with w_v >= min_p
    draw: the first kept v, in order, whose cumulative weight exceeds u * (weight of all kept)

`u` is a hash of (seed, position), so a draw depends on nothing but the seed, the position and the row's own logits.
Rows that truncate go through their tokens likeliest first, equal ones by id; the others by id, without a sort.

On a CPU everything but the weights is summed in blocks: a float64 copy of a whole row costs more than its softmax.

Shapes: S rows that sample, R rows of them, V vocabulary, B blocks of it, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from .arguments import check_logits, require

_MIN_TEMPERATURE = 1e-30
"""Smaller ones are no float32 that divides; the draw is as good as greedy long before."""
_BLOCK = 128
_FIRST_CANDIDATES = 512
"""Candidates that a row with top-p looks at before it sorts more; their mass nearly always reaches top_p."""
_TIE_SLACK = 64
"""Candidates beyond k, so that tokens equal to the k-th are seldom out of sight."""


@dataclass(frozen=True, slots=True)
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
    """Candidates that suffice for most rows; 0: no row has top-k or top-p, which is then true of all of them."""
    needs_mass: bool
    """Whether some row has top-p without top-k, so that the weight of its whole vocabulary counts."""
    has_min_p: bool

    @classmethod
    def of(
        cls,
        *,
        rows: np.ndarray,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        min_p: np.ndarray,
        seed: np.ndarray,
        position: np.ndarray,
        device: torch.device,
    ) -> Draws:
        """Draws of one kind, all truncated by top-k or top-p or none of them, from host arrays of their own dtypes."""
        is_truncated = (top_k > 0) | (top_p < 1.0)
        assert is_truncated.all() or not is_truncated.any(), "rows of two kinds in one group"
        needs_mass = bool(is_truncated[0] and (top_k == 0).any())
        num_candidates = max(int(top_k.max()) + _TIE_SLACK, _FIRST_CANDIDATES if needs_mass else 0)
        arrays = (rows, temperature, top_k, top_p, min_p, seed, position)
        return cls(
            *(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays),
            num_candidates=num_candidates if is_truncated[0] else 0,
            needs_mass=needs_mass,
            has_min_p=bool((min_p > 0).any()),
        )

    def select(self, index_R: Tensor, num_candidates: int) -> Draws:
        """The rows at `index_R`."""
        names = ("rows_R", "temperature_R", "top_k_R", "top_p_R", "min_p_R", "seed_R", "position_R")
        columns = {name: getattr(self, name)[index_R] for name in names}
        return replace(self, **columns, num_candidates=num_candidates)


def sample(logits_SV: Tensor, draws: list[Draws]) -> tuple[Tensor, Tensor]:
    """Choose a token for each row: as `draws` say, and greedily, the first largest logit, for rows in none of them.

    For whoever has parameters on the host; `sampling_rows.sample_rows` takes them on the device.

    Returns:
        int64 [S] token ids, and bool [S]: False, with token 0, where the largest logit is not a finite number.
    """
    if logits_SV.is_cuda:
        from .sampling_rows import SamplingRows, sample_rows

        rows = SamplingRows.from_draws(draws, len(logits_SV), logits_SV.device)
        return sample_rows(logits_SV, rows, has_nuclei=any(group.needs_mass for group in draws))
    token_ids_S = logits_SV.argmax(-1)
    peak_S = logits_SV.gather(1, token_ids_S[:, None]).squeeze(1)
    for group in draws:
        has_all_rows = len(group.rows_R) == len(logits_SV)  # rows are unique and in order
        logits_RV = logits_SV if has_all_rows else logits_SV[group.rows_R]
        draw = _draw_truncated if group.num_candidates else _draw_plain
        token_ids_S[group.rows_R] = draw(logits_RV, peak_S[group.rows_R], group)
    is_valid_S = peak_S.isfinite()
    return token_ids_S.where(is_valid_S, 0), is_valid_S


def token_logprobs(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural-log probabilities of the chosen tokens, and ids and logprobs `[R, num_top]` of the likeliest.

    Args:
        logits_RV: float32, float16 or bfloat16; last stride 1.
        token_ids_R: int64.
        num_top: At most V; of equal logits any may come first.

    Raises:
        ConfigError: A tensor of another shape, dtype, stride or device; more tokens than there are.
    """
    check_logprobs(logits_RV, token_ids_R, num_top)
    if logits_RV.is_cuda:
        from .logprobs_kernel import launch_token_logprobs

        return launch_token_logprobs(logits_RV, token_ids_R, num_top)
    logits_RV = logits_RV.float()
    normaliser_R1 = logits_RV.logsumexp(-1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, token_ids_R[:, None]) - normaliser_R1
    top_RK, top_ids_RK = logits_RV.topk(num_top)
    return chosen_R1.squeeze(1), top_ids_RK, top_RK - normaliser_R1


def check_logprobs(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> None:
    """Raise `ConfigError` for arguments that `token_logprobs` cannot take."""
    check_logits(logits_RV)
    require("token_ids_R", token_ids_R, torch.int64, tuple(logits_RV.shape[:1]), logits_RV.device)
    if not 0 <= num_top <= logits_RV.shape[1]:
        raise ConfigError(
            f"num_top is {num_top}, but it must be from 0 to {logits_RV.shape[1]}, the vocabulary", param="num_top"
        )


def token_logprobs_reference(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """`token_logprobs` by its definition, in float64; equal logits by id."""
    logprobs_RV = logits_RV.double().log_softmax(-1)
    top_RV, top_ids_RV = logprobs_RV.sort(dim=-1, descending=True, stable=True)
    chosen_R = logprobs_RV.gather(1, token_ids_R[:, None]).squeeze(1)
    return chosen_R, top_ids_RV[:, :num_top], top_RV[:, :num_top]


def uniform(seed_R: Tensor, position_R: Tensor) -> Tensor:
    """float64 [R] in [0, 1) with 52 random bits: SplitMix64 (Steele, Lea, Flood 2014) at a counter.

    The stream of a seed is the generator started at the seed's own hash, and `position` counts in it: neighbouring
    seeds have unrelated streams, and any position is reached at once. That is what counter-based generators such as
    Philox are for, with five products of 64 bits in place of ten rounds; the paper's generator passes BigCrush. It is
    all integers, so CPU and GPU have the same uniforms bit for bit.
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


def _weights(logits_RK: Tensor, peak_R: Tensor, draws: Draws) -> Tensor:
    """`exp((l - max l) / temperature)`: in [0, 1], 1 for the likeliest."""
    temperature_R1 = draws.temperature_R.clamp(min=_MIN_TEMPERATURE)[:, None]
    return (logits_RK - peak_R[:, None]).div_(temperature_R1).exp_()


def _draw_plain(logits_RV: Tensor, peak_R: Tensor, draws: Draws) -> Tensor:
    """Draw with temperature and min-p alone: the block first, then the token in it."""
    weights_RV = _weights(logits_RV, peak_R, draws)
    if draws.has_min_p:
        weights_RV.masked_fill_(weights_RV < draws.min_p_R[:, None], 0.0)
    cumulative_RB = _block_sums(weights_RV).cumsum(-1)
    target_R = uniform(draws.seed_R, draws.position_R) * cumulative_RB[:, -1]
    block_R = _pick(cumulative_RB, target_R)
    before_R = F.pad(cumulative_RB, (1, 0)).gather(1, block_R[:, None]).squeeze(1)
    token_ids_RN = block_R[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits_RV.device)
    is_token_RN = token_ids_RN < logits_RV.shape[1]
    in_block_RN = weights_RV.gather(1, token_ids_RN.where(is_token_RN, 0)) * is_token_RN
    return block_R * _BLOCK + _pick(in_block_RN.cumsum(-1, dtype=torch.float64), target_R - before_R)


def _draw_truncated(logits_RV: Tensor, peak_R: Tensor, draws: Draws) -> Tensor:
    """Draw with top-k and top-p among the likeliest candidates, and again among more where those did not suffice."""
    vocab_size = logits_RV.shape[1]
    # Looking whether candidates suffice waits for the device, so a GPU sorts everything at once.
    num_candidates = min(draws.num_candidates, vocab_size) if logits_RV.device.type == "cpu" else vocab_size
    candidates_RK, num_certain_R = _find_candidates(logits_RV, num_candidates)
    weights_RK = _weights(logits_RV.gather(1, candidates_RK), peak_R, draws)
    mass_R = _block_sums(_weights(logits_RV, peak_R, draws)).cumsum(-1)[:, -1] if draws.needs_mass else None
    num_kept_R, cumulative_RK = _truncate(weights_RK, mass_R, draws)
    kept_mass_R1 = cumulative_RK.gather(1, num_kept_R[:, None] - 1)
    target_R = uniform(draws.seed_R, draws.position_R) * kept_mass_R1.squeeze(1)
    picked_R = _pick(cumulative_RK.minimum(kept_mass_R1), target_R)
    token_ids_R = candidates_RK.gather(1, picked_R[:, None]).squeeze(1)
    if num_candidates < vocab_size:
        rest = (num_kept_R > num_certain_R).nonzero().squeeze(1)
        if len(rest):
            more = draws.select(rest, 16 * num_candidates)
            token_ids_R[rest] = _draw_truncated(logits_RV[rest], peak_R[rest], more)
    return token_ids_R


def _block_sums(weights_RV: Tensor) -> Tensor:
    """float64 [R, B] sums of `_BLOCK` neighbours; the last block may be shorter."""
    num_rows, vocab_size = weights_RV.shape
    whole = vocab_size - vocab_size % _BLOCK
    sums_RB = weights_RV[:, :whole].reshape(num_rows, -1, _BLOCK).sum(-1, dtype=torch.float64)
    if whole == vocab_size:
        return sums_RB
    return torch.cat((sums_RB, weights_RV[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)), dim=1)


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


def _truncate(weights_RK: Tensor, mass_R: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor]:
    """How many of the sorted candidates each row keeps (at least 1), and their cumulative weights in float64."""
    num_candidates = weights_RK.shape[1]
    rank_K = torch.arange(num_candidates, device=weights_RK.device)
    cumulative_RK = weights_RK.cumsum(-1, dtype=torch.float64)
    has_top_k_R = (draws.top_k_R > 0) & (draws.top_k_R <= num_candidates)
    top_k_R = draws.top_k_R.where(has_top_k_R, num_candidates)
    top_k_mass_R = cumulative_RK.gather(1, top_k_R[:, None] - 1).squeeze(1)
    mass_R = top_k_mass_R if mass_R is None else top_k_mass_R.where(has_top_k_R, mass_R)
    before_RK = cumulative_RK - weights_RK
    is_kept_RK = (
        (rank_K < top_k_R[:, None])
        & ((before_RK < (draws.top_p_R * mass_R)[:, None]) | (draws.top_p_R >= 1.0)[:, None])
        & (weights_RK >= draws.min_p_R[:, None])
    )
    return is_kept_RK.sum(-1).clamp(min=1), cumulative_RK


def _pick(cumulative_RK: Tensor, target_R: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds the target, or else the last that adds weight.

    Rows of NaN get any index.
    """
    picked_R1 = torch.searchsorted(cumulative_RK, target_R[:, None], right=True)
    last_R1 = torch.searchsorted(cumulative_RK, cumulative_RK[:, -1:].contiguous())
    return picked_R1.minimum(last_R1).clamp_(max=cumulative_RK.shape[1] - 1).squeeze(1)
