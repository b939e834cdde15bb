"""What the residency machine promises to those who wait, and whether it was kept.

Nobody waits longer than the patience, the answers that run then, and the loads of those who came before
(`flashtensors.residency.admission`), who are answered before their models make room in turn. So with `n` loads that
were under way when a request came or began while it waited, its own among them, the bound is

    own time + patience + answer + sum over the n loads of (load + answer)

where an answer counts as long as the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashtensors.residency.admission import LEAST_PATIENCE_S, PATIENCE_IN_SWAPS
from flashtensors.residency.rates import Rates


def find_patience_s(rates: Rates, num_bytes: int, patience_s: float | None = None) -> float:
    """Seconds after which busy models make room for a model of `num_bytes` on disk, the most patient there is.

    Args:
        rates: What a swap costs now.
        num_bytes: Of its weights.
        patience_s: The setting `swap_patience_s`.
    """
    if patience_s is not None:
        return patience_s
    return max(LEAST_PATIENCE_S, PATIENCE_IN_SWAPS * rates.seconds_to_load(num_bytes, 0))


@dataclass(frozen=True, slots=True)
class Load:
    """When a model's bytes began to move, and when all of them were there."""

    begun_s: float
    landed_s: float


def bound_measured(
    asked_s: float,
    first_token_s: float,
    *,
    patiences: Sequence[tuple[float, float]],
    loads: Sequence[Load],
    answer_s: float,
    own_s: float,
) -> float:
    """The bound of one request that was really served; times are those of one clock.

    Args:
        asked_s: When it came.
        first_token_s: When its first token came.
        patiences: The patience, each from a time on, in order.
        loads: All of the run: those count that moved bytes while the request waited, its own among them.
        answer_s: What an answer takes once its model is there, at most.
        own_s: What the request needs beside all these: its model's plan, its prompt.
    """
    before = [patience_s for since_s, patience_s in patiences if since_s <= asked_s][-1:]
    meanwhile = [patience_s for since_s, patience_s in patiences if asked_s < since_s <= first_token_s]
    ahead = [each for each in loads if _overlap(each, asked_s, first_token_s)]
    ahead_s = sum(each.landed_s - each.begun_s + answer_s for each in ahead)
    return own_s + max([*before, *meanwhile], default=LEAST_PATIENCE_S) + answer_s + ahead_s


def _overlap(load: Load, start_s: float, end_s: float) -> bool:
    return load.begun_s < end_s and load.landed_s > start_s


def compare(waits_s: Sequence[float], bounds_s: Sequence[float]) -> dict[str, Any]:
    """The longest wait and its bound, who came nearest to the bound, and how many went beyond it."""
    pairs = list(zip(waits_s, bounds_s, strict=True))
    longest_s, its_bound_s = max(pairs)
    return {
        "longest_wait_s": round(longest_s, 3),
        "its_bound_s": round(its_bound_s, 3),
        "largest_share_of_bound": round(max(wait_s / bound_s for wait_s, bound_s in pairs), 3),
        "num_beyond_bound": sum(wait_s > bound_s for wait_s, bound_s in pairs),
        "num": len(pairs),
    }
