"""How near to the device's limits is attention over a paged cache: decode, append, prefill, shared prefixes?

Each row is one case in bf16, 32 query heads over 8 key-value heads of dim 128 unless it says otherwise, pages of 64. A
decode is held to the rate of a copy (bytes of keys and values), a prefill to the rate of a large matrix product, both
measured here. Beside it, torch's scaled-dot-product attention on dense keys of the same batch (its flash and cuDNN
backends, whichever is quicker), which needs no pages. Metadata is made on the device once a step: `plan_us`. Decodes
have a second figure, `split_us`: those of the split kernel alone, beside what the rule chooses.

    python benchmarks/kernels/bench_attention.py
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report, spread
from timing import DEVICE, DTYPE, check, copy_bytes_per_us, num_sets, random, replayed_us

from flashtensors.kernels.attention.ragged import ragged_attention
from flashtensors.kernels.attention.work import AttentionWork

PAGE = 64
CASES = {
    "decode 64 x 8k": {"seqs": 64, "keys": 8192},
    "decode 256 x 4k": {"seqs": 256, "keys": 4096},
    "decode 64 x 1k": {"seqs": 64, "keys": 1024},
    "decode 256 x 1k": {"seqs": 256, "keys": 1024},
    "decode 8 x 1k": {"seqs": 8, "keys": 1024},
    "decode 1 x 1k": {"seqs": 1, "keys": 1024},
    "decode 1 x 8k": {"seqs": 1, "keys": 8192},
    "decode 1 x 32k": {"seqs": 1, "keys": 32768},
    "append 128 on 32k": {"seqs": 1, "keys": 32768, "new": 128},
    "append 4 x 512 on 8k": {"seqs": 4, "keys": 8192, "new": 512},
    "append 2048 on 16k": {"seqs": 1, "keys": 16384, "new": 2048},
    "prefill 8 x 2k": {"seqs": 8, "keys": 2048, "new": 2048},
    "prefill 2 x 8k": {"seqs": 2, "keys": 8192, "new": 8192},
    "prefill 1 x 32k": {"seqs": 1, "keys": 32768, "new": 32768},
    "decode 64 x 8k, head dim 64": {"seqs": 64, "keys": 8192, "head_dim": 64},
    "decode 64 x 8k, head dim 256": {"seqs": 64, "keys": 8192, "head_dim": 256, "heads": 16},
    "decode 64 x 8k, 1 head a key head": {"seqs": 64, "keys": 8192, "heads": 8},
    "decode 64 x 8k, 8 heads a key head": {"seqs": 64, "keys": 8192, "heads": 64},
    "decode 64 x 8k, soft cap": {"seqs": 64, "keys": 8192, "softcap": 50.0},
    "decode 64 x 8k, window 1k": {"seqs": 64, "keys": 8192, "window": 1024},
    "prefill 2 x 8k, head dim 64": {"seqs": 2, "keys": 8192, "new": 8192, "head_dim": 64},
    "prefill 2 x 8k, head dim 256": {"seqs": 2, "keys": 8192, "new": 8192, "head_dim": 256, "heads": 16},
    "prefill 2 x 8k, 1 head a key head": {"seqs": 2, "keys": 8192, "new": 8192, "heads": 16, "kv_heads": 16},
    "prefill 2 x 8k, 8 heads a key head": {"seqs": 2, "keys": 8192, "new": 8192, "heads": 64},
    "prefill 2 x 8k, soft cap": {"seqs": 2, "keys": 8192, "new": 8192, "softcap": 50.0},
    "prefill 2 x 8k, window 1k": {"seqs": 2, "keys": 8192, "new": 8192, "window": 1024},
}


class Batch:
    """Sequences of equal length over shuffled pages, and the same keys and values densely."""

    def __init__(
        self, seqs: int, keys: int, new: int = 1, heads: int = 32, kv_heads: int = 8, head_dim: int = 128
    ) -> None:
        self.seqs, self.keys, self.new, self.heads, self.kv_heads, self.head_dim = (
            seqs,
            keys,
            new,
            heads,
            kv_heads,
            head_dim,
        )
        pages = keys // PAGE
        self.num_bytes = 2 * seqs * keys * kv_heads * head_dim * DTYPE.itemsize
        self.caches = [
            (random(seqs * pages, kv_heads, PAGE, head_dim), random(seqs * pages, kv_heads, PAGE, head_dim))
            for _ in range(num_sets(self.num_bytes) if new == 1 else 2)
        ]
        self.tables = torch.randperm(seqs * pages, device=DEVICE).int().view(seqs, pages)
        self.q = random(seqs * new, heads, head_dim)
        self.starts = torch.arange(seqs + 1, device=DEVICE, dtype=torch.int32) * new
        self.lengths = torch.full((seqs,), keys, device=DEVICE, dtype=torch.int32)

    def dense(self, cache: Tensor) -> Tensor:
        """`[seqs, kv_heads, keys, head_dim]`."""
        return cache[self.tables.long()].transpose(1, 2).flatten(2, 3)

    def work(self, window: int | None = None, *, can_stream: bool = True) -> AttentionWork:
        """Queues for this batch's shape."""
        return AttentionWork(
            num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim, max_seqs=self.seqs,
            max_tokens=self.seqs * self.new, device=DEVICE, dtype=DTYPE, sliding_window=window, can_stream=can_stream,
        )  # fmt: skip

    def check(self, out: Tensor, window: int | None, softcap: float | None) -> None:
        """Hold the first and last rows of the first and last sequence to fp64."""
        k, v = (self.dense(cache) for cache in self.caches[0])
        for s in {0, self.seqs - 1}:
            for row in {0, self.new - 1}:
                last = int(self.lengths[s]) - self.new + row
                first = 0 if window is None else max(0, last + 1 - window)
                k_KLD, v_KLD = (x[s, :, first : last + 1].double() for x in (k, v))
                q_KGD = self.q[s * self.new + row].double().unflatten(0, (self.kv_heads, -1))
                scores = q_KGD @ k_KLD.mT * self.head_dim**-0.5
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                expected = (torch.softmax(scores, -1) @ v_KLD).flatten(0, 1)
                check(f"row {row} of sequence {s}", out[s * self.new + row], expected, 0.02)


def torch_calls(
    batch: Batch, backend: SDPBackend, caches: Sequence[tuple[Tensor, Tensor]]
) -> list[Callable[[], Tensor]]:
    """Attention by torch over dense copies of `caches`; raises `ValueError` where its mask does not fit."""
    is_causal = batch.new > 1
    if is_causal and batch.new != batch.keys:
        raise ValueError("its causal mask is aligned to the left")
    q = batch.q.view(batch.seqs, batch.new, batch.heads, batch.head_dim).transpose(1, 2)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True).transpose(1, 2)

    return [functools.partial(attend, batch.dense(k), batch.dense(v)) for k, v in caches]


def torch_us(batch: Batch) -> tuple[float, str] | None:
    """Quickest dense attention of torch, and its backend; None where none takes the case."""
    best: tuple[float, str] | None = None
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            us = spread(replayed_us(torch_calls(batch, backend, batch.caches[:1]), num_runs=8))["median"]
        except (RuntimeError, ValueError):
            continue
        if best is None or us < best[0]:
            best = us, backend.name.lower()
    return best


def measure(name: str, shape: dict[str, Any], copy_rate: float, matmul_rate: float) -> dict[str, Any]:
    shape = dict(shape)
    softcap, window = shape.pop("softcap", None), shape.pop("window", None)
    batch = Batch(**shape)
    work = batch.work(window)
    bounds = {"max_query_tokens": batch.new, "min_query_tokens": batch.new}
    out = torch.full_like(batch.q, float("nan"))
    work.plan(batch.starts, batch.lengths, **bounds)
    options = {"scale": batch.head_dim**-0.5, "softcap": softcap, "out_THD": out}
    calls = [lambda k=k, v=v: ragged_attention(batch.q, k, v, batch.tables, work, **options) for k, v in batch.caches]
    calls[0]()
    batch.check(out, window, softcap)
    us = spread(replayed_us(calls, num_runs=10))
    seen = min(window or batch.keys, batch.keys)
    pairs = batch.new * (seen if window else batch.keys - (batch.new - 1) / 2)
    flops = 4 * batch.seqs * pairs * batch.heads * batch.head_dim
    num_bytes = batch.num_bytes * (seen / batch.keys if batch.new == 1 else 1)
    floor_us = max(num_bytes / copy_rate, flops / matmul_rate)
    row: dict[str, Any] = {
        "case": name,
        "us": us,
        "of_limit": round(floor_us / us["median"], 3),
        "tb_per_s": round(num_bytes / us["median"] / 1e6, 2),
        "tflop_per_s": round(flops / us["median"] / 1e6, 1),
        "plan_us": spread(replayed_us([lambda: work.plan(batch.starts, batch.lengths, **bounds)]))["median"],
    }
    if batch.new == 1:
        split = batch.work(window, can_stream=False)
        split.plan(batch.starts, batch.lengths, **bounds)
        out.fill_(float("nan"))
        calls = [
            lambda k=k, v=v: ragged_attention(batch.q, k, v, batch.tables, split, **options) for k, v in batch.caches
        ]
        calls[0]()
        batch.check(out, window, softcap)
        row["split_us"] = spread(replayed_us(calls, num_runs=10))
    if softcap is None and window is None and (quickest := torch_us(batch)) is not None:
        row |= {
            "torch_us": quickest[0],
            "torch_backend": quickest[1],
            "times_torch": round(quickest[0] / us["median"], 2),
        }
    return row


def measure_unequal(seqs: int, copy_rate: float, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    """Decodes of 100 to 2,000 keys, by the kernel that the rule chooses and by the split one."""
    batch = Batch(seqs, 2048, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    lengths = random_lengths(seqs)
    batch.lengths.copy_(torch.tensor(lengths))
    num_bytes = 4 * sum(lengths) * kv_heads * head_dim
    row: dict[str, Any] = {"case": f"decode {seqs} x 100 to 2000, {heads} heads over {kv_heads} of dim {head_dim}"}
    for name, can_stream in (("us", True), ("split_us", False)):
        work = batch.work(can_stream=can_stream)
        work.plan(batch.starts, batch.lengths, max_query_tokens=1)
        calls = [
            lambda k=k, v=v, work=work: ragged_attention(batch.q, k, v, batch.tables, work, scale=head_dim**-0.5)
            for k, v in batch.caches
        ]
        batch.check(calls[0](), None, None)
        row[name] = spread(replayed_us(calls, num_runs=10))
        row[f"{name}_of_limit"] = round(num_bytes / copy_rate / row[name]["median"], 3)
    return row


def random_lengths(seqs: int) -> list[int]:
    draw = Random(0)
    return [draw.randint(100, 2000) for _ in range(seqs)]


def measure_shared_prefix(prefix: int = 8192, own: int = 256, seqs: int = 64) -> dict[str, Any]:
    """64 decodes over one prefix: with it attended once for all, and without."""
    batch = Batch(seqs, prefix + own)
    batch.tables[:, : prefix // PAGE] = batch.tables[0, : prefix // PAGE].clone()
    (k, v), scale = batch.caches[0], batch.head_dim**-0.5
    plain, grouped = batch.work(), batch.work()
    group = torch.tensor([[0, seqs, prefix]], dtype=torch.int32, device=DEVICE)
    plain.plan(batch.starts, batch.lengths, max_query_tokens=1)
    grouped.plan(batch.starts, batch.lengths, groups=group, max_query_tokens=1)
    out = torch.empty_like(batch.q)

    def once() -> None:
        ragged_attention(batch.q, k, v, batch.tables, grouped, scale=scale, out_THD=out)

    once()
    batch.check(out, None, None)
    us = spread(replayed_us([once]))
    plain_us = spread(replayed_us([lambda: ragged_attention(batch.q, k, v, batch.tables, plain, scale=scale)]))
    ratio = round(plain_us["median"] / us["median"], 2)
    return {"case": "64 sharing 8k + 256 own", "us": us, "without_sharing_us": plain_us, "times_without": ratio}


def measure_mixed(prefills: int = 2, new: int = 4096, decodes: int = 32, keys: int = 1024) -> dict[str, Any]:
    """Prefills and decodes in one batch, and as two batches one after the other."""
    tokens, lengths = [1] * decodes + [new] * prefills, [keys] * decodes + [new] * prefills
    pages = -(-max(lengths) // PAGE)
    k, v = random(len(tokens) * pages, 8, PAGE, 128), random(len(tokens) * pages, 8, PAGE, 128)
    tables = torch.randperm(len(k), device=DEVICE).int().view(-1, pages)
    q = random(sum(tokens), 32, 128)
    kv_lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32, device=DEVICE)
    scale = 128**-0.5

    def attend(first: int, end: int, **bounds: int) -> Callable[[], Tensor]:
        rows = slice(sum(tokens[:first]), sum(tokens[:end]))
        work = AttentionWork(
            num_heads=32, num_kv_heads=8, head_dim=128, max_seqs=end - first, max_tokens=sum(tokens[first:end]),
            device=DEVICE,
        )  # fmt: skip
        own_starts, own_lengths = starts[first : end + 1] - starts[first], kv_lengths[first:end].contiguous()
        work.plan(own_starts, own_lengths, **bounds)
        own_q, own_tables = q[rows].contiguous(), tables[first:end].contiguous()
        return lambda: ragged_attention(own_q, k, v, own_tables, work, scale=scale)

    together = attend(0, len(tokens))
    apart = attend(0, decodes, max_query_tokens=1), attend(decodes, len(tokens), min_query_tokens=new)
    for row in (0, sum(tokens) - 1):
        check(f"mixed row {row}", together()[row], torch.cat([call() for call in apart])[row].double(), 0.02)
    us = spread(replayed_us([together]))
    apart_us = [spread(replayed_us([call]))["median"] for call in apart]
    return {
        "case": f"mixed {prefills} x {new} prefill + {decodes} decodes at {keys}",
        "us": us,
        "apart_us": apart_us,
        "of_apart": round(us["median"] / sum(apart_us), 3),
    }


def matmul_flop_per_us() -> float:
    a, b = random(8192, 8192), random(8192, 8192)
    return 2 * 8192**3 / min(replayed_us([lambda: a @ b]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.manual_seed(0)
    copy_rate, matmul_rate = copy_bytes_per_us(), matmul_flop_per_us()
    rows = []
    for name, shape in CASES.items():
        rows.append(measure(name, shape, copy_rate, matmul_rate))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    for heads, kv_heads, head_dim in ((16, 8, 128), (32, 8, 64), (32, 8, 128)):
        rows += [measure_unequal(seqs, copy_rate, heads, kv_heads, head_dim) for seqs in (16, 32, 64, 128, 256)]
    rows += [measure_shared_prefix(), measure_mixed()]
    rates = {"copy_tb_per_s": round(copy_rate / 1e6, 3), "matmul_tflop_per_s": round(matmul_rate / 1e6, 1)}
    report("attention", rows, **rates)


if __name__ == "__main__":
    main()
