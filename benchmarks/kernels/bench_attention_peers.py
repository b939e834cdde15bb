"""How does attention compare with FlashInfer and FlashAttention-3 on one H200, in the same run?

Each row is one case in bf16, 32 query heads over 8 key heads of dim 128, pages of 64, and the peers that take it:
FlashInfer's decode (tensor cores, XQA) and paged prefill (its fa3 and fa2 backends) with its plan left out of the time,
FlashAttention-3 on dense keys (the wheel has no pages). What is not installed or refuses a case is left out and named.

    python benchmarks/kernels/bench_attention_peers.py [--prepare]       (--prepare: have FlashInfer compile, no more)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_attention import CASES, PAGE, Batch
from record import report, spread
from timing import DEVICE, DTYPE, replayed_us

from flashtensors.kernels.attention.ragged import ragged_attention

Peer = tuple[str, Callable[[], list[Callable[[], Any]]]]


class FlashInfer:
    """Its wrappers over the pages of a batch, planned."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.workspace = torch.zeros(512 << 20, dtype=torch.uint8, device=DEVICE)
        pages = batch.keys // PAGE
        self.page_starts = torch.arange(batch.seqs + 1, dtype=torch.int32) * pages
        self.indices = batch.tables.flatten()
        self.last_page = torch.full((batch.seqs,), PAGE, dtype=torch.int32)

    def tensor_core_decode(self) -> list[Callable[[], Any]]:
        """Decode by its Ampere prefill template."""
        import flashinfer

        batch = self.batch
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace, "HND", use_tensor_cores=True, use_cuda_graph=True,
            paged_kv_indptr_buffer=self.page_starts.to(DEVICE), paged_kv_indices_buffer=self.indices.clone(),
            paged_kv_last_page_len_buffer=self.last_page.to(DEVICE),
        )  # fmt: skip
        wrapper.plan(
            self.page_starts, self.indices, self.last_page, batch.heads, batch.kv_heads, batch.head_dim, PAGE,
            q_data_type=DTYPE, kv_data_type=DTYPE,
        )  # fmt: skip
        return [lambda kv=kv: wrapper.run(batch.q, kv) for kv in batch.caches]

    def xqa_decode(self) -> list[Callable[[], Any]]:
        """Decode by the XQA kernel that it carries."""
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        batch = self.batch
        return [
            lambda kv=kv: xqa_batch_decode_with_kv_cache(
                batch.q, kv, self.workspace, batch.tables, batch.lengths, batch.keys, bmm1_scale=batch.head_dim**-0.5,
                bmm2_scale=1.0, kv_layout="HND",
            )
            for kv in batch.caches
        ]  # fmt: skip

    def prefill(self, backend: str) -> list[Callable[[], Any]]:
        """Prefill and append by one of its backends."""
        import flashinfer

        batch = self.batch
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace, "HND", backend=backend)
        wrapper.plan(
            batch.starts.cpu(), self.page_starts, self.indices, self.last_page, batch.heads, batch.kv_heads,
            batch.head_dim, PAGE, causal=True, q_data_type=DTYPE, kv_data_type=DTYPE,
        )  # fmt: skip
        return [lambda kv=kv: wrapper.run(batch.q, kv) for kv in batch.caches]


def flash_attention_3(batch: Batch) -> list[Callable[[], Any]]:
    from fa3_fwd_interface import flash_attn_varlen_func

    k, v = (batch.dense(cache).transpose(1, 2).flatten(0, 1).contiguous() for cache in batch.caches[0])
    starts, most = batch.starts, batch.new
    return [lambda: flash_attn_varlen_func(batch.q, k, v, starts, starts, most, most, causal=True)]


def peers_of(batch: Batch) -> Iterator[Peer]:
    flashinfer = FlashInfer(batch)
    if batch.new == 1:
        yield "flashinfer_tensor_cores", flashinfer.tensor_core_decode
        yield "flashinfer_xqa", flashinfer.xqa_decode
        return
    yield "flashinfer_fa3", lambda: flashinfer.prefill("fa3")
    yield "flashinfer_fa2", lambda: flashinfer.prefill("fa2")
    if batch.new == batch.keys:
        yield "fa3_dense", lambda: flash_attention_3(batch)


def measure(name: str) -> dict[str, Any]:
    batch = Batch(**CASES[name])
    work = batch.work()
    work.plan(batch.starts, batch.lengths, max_query_tokens=batch.new, min_query_tokens=batch.new)
    options = {"scale": batch.head_dim**-0.5, "out_THD": torch.empty_like(batch.q)}
    calls = [lambda k=k, v=v: ragged_attention(batch.q, k, v, batch.tables, work, **options) for k, v in batch.caches]
    calls[0]()
    batch.check(options["out_THD"], None, None)
    us = spread(replayed_us(calls, num_runs=10))
    row: dict[str, Any] = {"case": name, "us": us}
    for peer, prepare in peers_of(batch):
        try:
            peer_us = spread(replayed_us(prepare(), num_runs=10))["median"]
        except (ImportError, AttributeError, TypeError, ValueError, OSError, RuntimeError) as error:
            row[f"{peer}_error"] = f"{type(error).__name__}: {error}"[:160]
        else:
            row |= {f"{peer}_us": peer_us, f"times_{peer}": round(peer_us / us["median"], 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.prepare:
        for shape in ({"seqs": 1, "keys": 1024}, {"seqs": 1, "keys": 1024, "new": 1024}):
            for peer, prepare in peers_of(Batch(**shape)):
                print(peer, [call() is not None for call in prepare()[:1]], flush=True)
        return
    rows = []
    for name, shape in CASES.items():
        if set(shape) <= {"seqs", "keys", "new"}:
            rows.append(measure(name))
            print(rows[-1], flush=True)
            torch.cuda.empty_cache()
    report("attention-peers", rows)


if __name__ == "__main__":
    main()
