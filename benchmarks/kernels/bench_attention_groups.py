"""When does it pay to compute a shared prefix once, and is it ever slower where the rule says that it pays?

Decodes of N sequences that share their first tokens and have 256 own ones, in bf16, 32 query heads over 8 key heads of
dim 128: as a group and alone, from the same cache, with the same answer. `pays` is what `group_cost.py` says.

    python benchmarks/kernels/bench_attention_groups.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread
from timing import DEVICE, check, num_sets, random, replayed_us

from flashtensors.kernels.attention.group_cost import does_group_pay
from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork

HEADS, KV_HEADS, HEAD_DIM, PAGE, OWN = 32, 8, 128, 64, 256
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * 2
MEMBERS = (2, 4, 8, 16, 32, 64, 128, 256)
PREFIXES = (256, 512, 1024, 2048, 4096, 8192)


def measure(members: int, prefix: int) -> dict[str, Any]:
    shared_pages, own_pages = prefix // PAGE, OWN // PAGE
    num_pages = shared_pages + members * own_pages
    caches = [
        (random(num_pages, KV_HEADS, PAGE, HEAD_DIM), random(num_pages, KV_HEADS, PAGE, HEAD_DIM))
        for _ in range(min(8, num_sets(num_pages * PAGE * TOKEN_BYTES)))
    ]
    own = torch.arange(shared_pages, num_pages).view(members, own_pages)
    tables = torch.cat([torch.arange(shared_pages).expand(members, -1), own], 1).int().to(DEVICE)
    q = random(members, HEADS, HEAD_DIM)
    starts = torch.arange(members + 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((members,), prefix + OWN, dtype=torch.int32, device=DEVICE)
    group = torch.tensor([[0, members, prefix]], dtype=torch.int32, device=DEVICE)
    outs, us = [], []
    for groups in (None, group):
        work = AttentionWork(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, max_seqs=members, max_tokens=members,
            device=DEVICE,
        )  # fmt: skip
        work.plan(starts, lengths, groups=groups, max_query_tokens=1)
        options = {"scale": HEAD_DIM**-0.5, "out_THD": torch.empty_like(q)}
        calls = [lambda k=k, v=v: ragged_attention(q, k, v, tables, work, **options) for k, v in caches]  # noqa: B023
        outs.append(calls[0]().clone())
        us.append(spread(replayed_us(calls, num_runs=10)))
    check(f"{members} members, prefix of {prefix}", outs[1], outs[0].double(), 0.02)
    return {
        "members": members,
        "prefix_tokens": prefix,
        "alone_us": us[0],
        "group_us": us[1],
        "times_alone": round(us[0]["median"] / us[1]["median"], 2),
        "pays": does_group_pay(members, prefix, TOKEN_BYTES),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    rows = [measure(members, prefix) for members in MEMBERS for prefix in PREFIXES]
    chosen = [row["times_alone"] for row in rows if row["pays"]]
    report("attention-groups", rows, slowest_where_it_pays=min(chosen), quickest_where_not=max(
        row["times_alone"] for row in rows if not row["pays"]
    ))  # fmt: skip


if __name__ == "__main__":
    main()
