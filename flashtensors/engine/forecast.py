"""How many KV cache blocks running sequences will hold, step by step, if their lengths are as expected.

A sequence whose next step ends with n computed tokens holds ceil((n + t) / B) blocks t steps later, until it ends. So
usage only grows between two ends, and its peak is at one of them. With the sequences sorted by their ends, the latest
first, those alive at the j-th end are the first j, and sums over them are running sums. A ceiling splits into whole
blocks and a fill level, floor((a + t) / B) = floor(a / B) + floor(t / B) + [a mod B + t mod B >= B], so counts of fill
levels take the place of a loop over time. To look ahead through the ends alone is the idea of Tokasaurus and of the
Past-Future scheduler (arXiv 2507.10150).

Shapes: N sequences, B tokens in a block, or blocks in a table.
"""

from __future__ import annotations

import numpy as np


def usage_at_ends(
    lengths_N: np.ndarray, ends_N: np.ndarray, offsets_N: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Steps after which a sequence ends, latest first, and the blocks held in each of these steps.

    Where several end in one step, the last of their entries counts them all.

    Args:
        lengths_N: Tokens computed once the step that is planned now is done.
        ends_N: Last step in which each holds its blocks; the step that is planned now is 0.
        offsets_N: What to add to each sequence's own blocks: less than 0 where it holds blocks that are counted
            with another.
        block_size: Tokens in a block.
    """
    order = np.argsort(-ends_N, kind="stable")
    ends = ends_N[order]
    full, fill = np.divmod(lengths_N[order] + (block_size - 1), block_size)
    rolled, rest = np.divmod(ends, block_size)
    count_type = np.int16 if len(ends) < np.iinfo(np.int16).max else np.int32  # half the bytes, half the time
    reaches_BN = fill.astype(np.int16) >= np.arange(block_size, 0, -1, dtype=np.int16)[:, None]  # [r, i]: fill + r >= B
    num_reaching_BN = reaches_BN.cumsum(axis=1, dtype=count_type)
    carried = num_reaching_BN[rest, np.arange(len(ends))]
    num_alive = np.arange(1, len(ends) + 1)
    return ends, (full + offsets_N[order]).cumsum() + num_alive * rolled + carried


def peak_usage(lengths_N: np.ndarray, ends_N: np.ndarray, offsets_N: np.ndarray, block_size: int) -> int:
    """Most blocks held in any step from the one that is planned now; arguments as for `usage_at_ends`."""
    return int(usage_at_ends(lengths_N, ends_N, offsets_N, block_size)[1].max(initial=0))


def count_lasting_blocks(
    tables_NB: np.ndarray, num_held_N: np.ndarray, ends_N: np.ndarray, num_blocks: int
) -> np.ndarray:
    """Of each sequence's blocks, those that no other sequence holds longer: distinct blocks, each counted once.

    Args:
        tables_NB: Block ids of each sequence.
        num_held_N: How many of them count.
        ends_N: Last step in which each holds them.
        num_blocks: Physical blocks.
    """
    order = np.argsort(ends_N, kind="stable")
    is_held_NB = np.arange(tables_NB.shape[1]) < num_held_N[order, None]
    block_ids = tables_NB[order][is_held_NB]
    owners = order.repeat(num_held_N[order])
    last_owner = np.zeros(num_blocks, dtype=np.int64)
    last_owner[block_ids] = owners  # of equal indices the last one stays
    return np.bincount(owners[last_owner[block_ids] == owners], minlength=len(ends_N))
