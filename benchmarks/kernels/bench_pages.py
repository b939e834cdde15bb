"""How near to the rate of a copy do pages of a KV cache move, for all layers in one launch?

Each row is one (operation, number of pages) on the caches of 32 layers with 8 kv heads of 128 in bf16, pages of 64
tokens in random order. Beside it, in the same run: torch's indexing, a launch for each cache. Gathered
pages go to one buffer. Before timing, each answer must be equal to torch's.

    python benchmarks/kernels/bench_pages.py [--blocks 1024 2048 4096]                       (words of 4 bytes)
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report
from timing import DTYPE, MOST_SETS, Call, compare, copy_bytes_per_us, random

from flashtensors.kernels.pages import CacheSet, make_cache_set
from flashtensors.kernels.pages_kernel import launch_copy_pages, launch_gather_pages, launch_scatter_pages

NUM_CACHES = 64
PAGE_SHAPE = (8, 64, 128)
NUM_PAGES = 512
COUNTS = [1, 8, 64]


def page_sets(count: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pages to read and others to write, pairs that share none; several for rotation."""
    pages = torch.randperm(NUM_PAGES).to(device)
    return [(pair[:count], pair[count:]) for pair in pages.split(2 * count)[:MOST_SETS] if len(pair) == 2 * count]


def require_equal(name: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not all(torch.equal(a, b) for a, b in pairs):
        raise SystemExit(f"{name}: not what torch gives")


def measure(operation: str, count: int, cache_set: CacheSet, copy_rate: float, block: int) -> dict[str, Any]:
    caches, sets = cache_set.caches, page_sets(count, cache_set.addresses_C.device)
    buffer = torch.zeros(count, *cache_set.page_shape, dtype=DTYPE, device=caches[0].device)
    source, target = sets[0]

    def torch_copy(source: Tensor, target: Tensor) -> Call:
        return lambda: [cache.index_copy_(0, target, cache[source]) for cache in caches]

    def torch_gather(source: Tensor) -> Call:
        return lambda: [torch.index_select(cache, 0, source) for cache in caches]

    def torch_scatter(target: Tensor) -> Call:
        return lambda: [cache.index_copy_(0, target, buffer[:, i]) for i, cache in enumerate(caches)]

    if operation == "copy":
        launch_copy_pages(cache_set, source, target, block=block)
        require_equal(operation, [(cache[target], cache[source]) for cache in caches])
        calls: list[Call] = [lambda s=s: launch_copy_pages(cache_set, *s, block=block) for s in sets]
        torch_calls = [torch_copy(*s) for s in sets]
    elif operation == "gather":
        launch_gather_pages(cache_set, source, buffer, block=block)
        require_equal(operation, [(buffer[:, i], cache[source]) for i, cache in enumerate(caches)])
        calls = [lambda s=s: launch_gather_pages(cache_set, s[0], buffer, block=block) for s in sets]
        torch_calls = [torch_gather(s[0]) for s in sets]
    else:
        launch_scatter_pages(buffer.normal_(), cache_set, target, block=block)
        require_equal(operation, [(cache[target], buffer[:, i]) for i, cache in enumerate(caches)])
        calls = [lambda s=s: launch_scatter_pages(buffer, cache_set, s[1], block=block) for s in sets]
        torch_calls = [torch_scatter(s[1]) for s in sets]
    return compare(calls, 2 * buffer.nbytes, copy_rate, {"torch": torch_calls})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[2048])
    args = parser.parse_args()
    copy_rate = copy_bytes_per_us()
    cache_set = make_cache_set([random(NUM_PAGES, *PAGE_SHAPE) for _ in range(NUM_CACHES)])
    rows: list[dict[str, Any]] = []
    for operation, count, block in itertools.product(("copy", "gather", "scatter"), COUNTS, args.blocks):
        measured = measure(operation, count, cache_set, copy_rate, block)
        rows.append({"operation": operation, "pages": count, "block_words": block, **measured})
        print(rows[-1], flush=True)
    report("pages", rows, copy_tb_per_s=round(copy_rate / 1e6, 3))


if __name__ == "__main__":
    main()
