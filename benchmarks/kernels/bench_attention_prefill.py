"""How quick are prefill and append beside FlashAttention-3 in the same run, and over fp8 caches beside bf16 ones?

Each row is one case of `bench_attention.py` in bf16 over shuffled pages. FlashAttention-3 (the `fa3-fwd` wheel, left
out where it is not installed) has its keys in one piece and takes neither an append, a cap nor a window here. Long
cases run into the device's power limit, which what ran before decides with: all are timed in turns, three times each,
and a figure is the median of the three medians.

    python benchmarks/kernels/bench_attention_prefill.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_attention import CASES, Batch
from record import report, spread
from timing import DEVICE, DTYPE, Call, replayed_us

from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork

FP8 = torch.float8_e4m3fn
NUM_ROUNDS = 3


def paged_calls(
    batch: Batch, caches: Sequence[tuple[Tensor, Tensor]], softcap: float | None, window: int | None
) -> tuple[list[Call], Tensor]:
    """One call for each pair of caches, and what they write."""
    kv_dtype = caches[0][0].dtype
    work = AttentionWork(
        num_heads=batch.heads, num_kv_heads=batch.kv_heads, head_dim=batch.head_dim, max_seqs=batch.seqs,
        max_tokens=batch.seqs * batch.new, device=DEVICE, dtype=DTYPE, kv_dtype=kv_dtype, sliding_window=window,
    )  # fmt: skip
    work.plan(batch.starts, batch.lengths, max_query_tokens=batch.new, min_query_tokens=batch.new)
    ones = torch.ones(batch.kv_heads, device=DEVICE) if kv_dtype == FP8 else None
    out = torch.empty_like(batch.q)
    options = {"scale": batch.head_dim**-0.5, "softcap": softcap, "k_scales_K": ones, "v_scales_K": ones}
    return [
        lambda k=k, v=v: ragged_attention(batch.q, k, v, batch.tables, work, out_THD=out, **options) for k, v in caches
    ], out


def flash_attention_3(batch: Batch) -> list[Call]:
    from fa3_fwd_interface import flash_attn_varlen_func

    k, v = (batch.dense(cache).transpose(1, 2).flatten(0, 1).contiguous() for cache in batch.caches[0])
    starts, most = batch.starts, batch.new
    return [lambda: flash_attn_varlen_func(batch.q, k, v, starts, starts, most, most, causal=True)]


def times(calls: Mapping[str, Sequence[Call]]) -> dict[str, float]:
    """Median of the rounds' medians, in µs."""
    rounds = [{name: spread(replayed_us(each, num_runs=6))["median"] for name, each in calls.items()}
              for _ in range(NUM_ROUNDS)]  # fmt: skip
    return {name: round(statistics.median(each[name] for each in rounds), 1) for name in calls}


def measure(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    shape = dict(shape)
    softcap, window = shape.pop("softcap", None), shape.pop("window", None)
    batch = Batch(**shape)
    fp8_caches = [(k.to(FP8), v.to(FP8)) for k, v in batch.caches]
    # what fp8 holds, so that one definition checks both
    batch.caches = [(k.to(DTYPE), v.to(DTYPE)) for k, v in fp8_caches]
    calls: dict[str, Sequence[Call]] = {}
    for label, caches in (("", batch.caches), ("fp8_", fp8_caches)):
        calls[label], out = paged_calls(batch, caches, softcap, window)
        calls[label][0]()
        batch.check(out, window, softcap)
    row: dict[str, Any] = {"case": name}
    if batch.new == batch.keys and softcap is None and window is None:
        try:
            dense = flash_attention_3(batch)
            dense[0]()
        except (ImportError, RuntimeError) as error:
            row["fa3_dense_error"] = f"{type(error).__name__}: {error}"[:160]
        else:
            calls["fa3_dense_"] = dense
    us = times(calls)
    row |= {f"{label}us": value for label, value in us.items()}
    row["tflop_per_s"] = round(num_flops(batch, window) / us[""] / 1e6, 1)
    row |= {f"times_{label[:-1]}": round(value / us[""], 3) for label, value in us.items() if label}
    return row


def num_flops(batch: Batch, window: int | None) -> int:
    """Of both products, over the keys that each row sees."""
    seen = [position + 1 for position in range(batch.keys - batch.new, batch.keys)]
    pairs = sum(seen if window is None else (min(each, window) for each in seen))
    return 4 * batch.seqs * batch.heads * batch.head_dim * pairs


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    rows = []
    for name, shape in CASES.items():
        if shape.get("new", 1) > 1:
            rows.append(measure(name, shape))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    report("attention-prefill", rows)


if __name__ == "__main__":
    main()
