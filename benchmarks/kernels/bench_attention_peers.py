"""How does attention compare with FlashInfer and FlashAttention-3 on one H200, in the same run?

Each row is one case in bf16, pages of 64, and the peers that take it: FlashInfer's decode (tensor cores, CUDA cores,
XQA) and paged prefill (its fa3 and fa2 backends) with its plan left out of the time, FlashAttention-3 on dense keys
(the wheel has neither pages nor windows), torch's flash and cuDNN backends on such keys. The plain cases have 32 query
heads over 8 key heads of dim 128; the variants change the head dim, the heads that share a key head, the cap on scores
or the window. Every answer is held to ours before it is timed, and ours to fp64; a peer that is not installed, refuses
a case or answers otherwise is left out and named. All are timed in turns, three times each, since long cases run into
the device's power limit.

    python benchmarks/kernels/bench_attention_peers.py [--variants] [--prepare]

`--prepare` has FlashInfer compile what the cases need, no more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_attention import CASES, PAGE, Batch, torch_calls
from bench_attention_prefill import num_flops, paged_calls, times
from record import report
from timing import DEVICE, DTYPE, Call, replayed_us

Peer = tuple[str, Callable[[], list[Callable[[], Tensor]]]]

PLAIN = {name: shape for name, shape in CASES.items() if set(shape) <= {"seqs", "keys", "new"}}
LENGTHS = {
    "prefill 2 x 8k": {"seqs": 2, "keys": 8192, "new": 8192},
    "decode 64 x 8k": {"seqs": 64, "keys": 8192},
}
CHANGES: dict[str, dict[str, Any]] = {
    "head dim 64": {"head_dim": 64},
    "head dim 256": {"head_dim": 256},
    "1 head a key head": {"kv_heads": 32},
    "4 heads a key head": {"kv_heads": 8},
    "8 heads a key head": {"kv_heads": 4},
    "soft cap 30": {"softcap": 30.0},
    "window 1024": {"window": 1024},
}
VARIANTS = {
    f"{name}, {change}": lengths | changed for name, lengths in LENGTHS.items() for change, changed in CHANGES.items()
}
LARGEST_DIFFERENCE = 0.02


class FlashInfer:
    """Its wrappers over the pages of a batch, planned."""

    def __init__(self, batch: Batch, softcap: float | None, window: int | None) -> None:
        self.batch, self.softcap = batch, softcap
        self.window_left = -1 if window is None else window - 1
        pages = batch.keys // PAGE
        self.page_starts = torch.arange(batch.seqs + 1, dtype=torch.int32) * pages
        self.indices = batch.tables.flatten()
        self.last_page = torch.full((batch.seqs,), PAGE, dtype=torch.int32)
        self.plan_options = {
            "q_data_type": DTYPE, "kv_data_type": DTYPE, "logits_soft_cap": softcap, "window_left": self.window_left,
        }  # fmt: skip

    def workspace(self) -> Tensor:
        """Of one wrapper alone: XQA keeps semaphores there that must start at zero."""
        return torch.zeros(512 << 20, dtype=torch.uint8, device=DEVICE)

    def decode(self, *, use_tensor_cores: bool) -> list[Callable[[], Tensor]]:
        """Decode by its Ampere prefill template, or without tensor cores by its decode template."""
        import flashinfer

        batch = self.batch
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace(), "HND", use_tensor_cores=use_tensor_cores, use_cuda_graph=True,
            paged_kv_indptr_buffer=self.page_starts.to(DEVICE), paged_kv_indices_buffer=self.indices.clone(),
            paged_kv_last_page_len_buffer=self.last_page.to(DEVICE),
        )  # fmt: skip
        wrapper.plan(
            self.page_starts, self.indices, self.last_page, batch.heads, batch.kv_heads, batch.head_dim, PAGE,
            **self.plan_options,
        )  # fmt: skip
        return [lambda kv=kv: wrapper.run(batch.q, kv) for kv in batch.caches]

    def xqa_decode(self) -> list[Callable[[], Tensor]]:
        """Decode by the XQA kernel that it carries."""
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        if self.softcap is not None:
            raise ValueError("it has no cap")
        batch, workspace = self.batch, self.workspace()
        return [
            lambda kv=kv: xqa_batch_decode_with_kv_cache(
                batch.q, kv, workspace, batch.tables, batch.lengths, batch.keys, bmm1_scale=batch.head_dim**-0.5,
                bmm2_scale=1.0, window_left=self.window_left, kv_layout="HND",
            )
            for kv in batch.caches
        ]  # fmt: skip

    def prefill(self, backend: str) -> list[Callable[[], Tensor]]:
        """Prefill and append by one of its backends."""
        import flashinfer

        batch = self.batch
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self.workspace(), "HND", backend=backend)
        wrapper.plan(
            batch.starts.cpu(), self.page_starts, self.indices, self.last_page, batch.heads, batch.kv_heads,
            batch.head_dim, PAGE, causal=True, **self.plan_options,
        )  # fmt: skip
        return [lambda kv=kv: wrapper.run(batch.q, kv) for kv in batch.caches]


def flash_attention_3(batch: Batch, softcap: float | None, window: int | None) -> list[Callable[[], Tensor]]:
    """Over dense copies of the keys and values; where the cache is longer than the query, scheduled before."""
    from fa3_fwd_interface import flash_attn_varlen_func, flash_attn_with_kvcache, get_scheduler_metadata

    seen = (-1, -1) if window is None else (window - 1, 0)
    options = {"causal": True, "window_size": seen, "softcap": softcap or 0.0}
    dense = [[batch.dense(cache).transpose(1, 2).contiguous() for cache in pair] for pair in batch.caches]
    if batch.new == batch.keys:
        starts, most = batch.starts, batch.new
        flat = [[each.flatten(0, 1) for each in pair] for pair in dense]
        return [
            lambda k=k, v=v: flash_attn_varlen_func(batch.q, k, v, starts, starts, most, most, **options)
            for k, v in flat
        ]
    q = batch.q.view(batch.seqs, batch.new, batch.heads, batch.head_dim)
    metadata = get_scheduler_metadata(
        batch.seqs, batch.new, batch.keys, batch.heads, batch.kv_heads, batch.head_dim, batch.lengths,
        qkv_dtype=DTYPE, causal=True, window_size=seen, has_softcap=softcap is not None,
    )  # fmt: skip
    return [
        lambda k=k, v=v: flash_attn_with_kvcache(
            q, k, v, cache_seqlens=batch.lengths, scheduler_metadata=metadata, **options
        )
        for k, v in dense
    ]


def torch_attention(
    batch: Batch, backend: SDPBackend, softcap: float | None, window: int | None
) -> list[Callable[[], Tensor]]:
    """Over dense copies of the keys and values."""
    if softcap is not None or window is not None:
        raise ValueError("it has neither caps nor windows")
    return torch_calls(batch, backend, batch.caches)


def peers_of(batch: Batch, softcap: float | None, window: int | None) -> Iterator[Peer]:
    flashinfer = FlashInfer(batch, softcap, window)
    if batch.new == 1:
        yield "flashinfer_tensor_cores", lambda: flashinfer.decode(use_tensor_cores=True)
        if batch.heads <= 2 * batch.kv_heads:  # of more heads a key head, tensor cores make better use
            yield "flashinfer_cuda_cores", lambda: flashinfer.decode(use_tensor_cores=False)
        yield "flashinfer_xqa", flashinfer.xqa_decode
    else:
        yield "flashinfer_fa3", lambda: flashinfer.prefill("fa3")
        yield "flashinfer_fa2", lambda: flashinfer.prefill("fa2")
    yield "fa3_dense", lambda: flash_attention_3(batch, softcap, window)
    yield "torch_flash", lambda: torch_attention(batch, SDPBackend.FLASH_ATTENTION, softcap, window)
    yield "torch_cudnn", lambda: torch_attention(batch, SDPBackend.CUDNN_ATTENTION, softcap, window)


def hold(actual: Tensor, expected: Tensor) -> None:
    """Refuse an answer further from ours than rounding explains."""
    expected = expected.float()
    difference = float(((actual.reshape(expected.shape).float() - expected).abs() / (1 + expected.abs())).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"its answer is {difference:.3g} from ours")


def measure(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    shape = dict(shape)
    softcap, window = shape.pop("softcap", None), shape.pop("window", None)
    batch = Batch(**shape)
    ours, out = paged_calls(batch, batch.caches, softcap, window)
    ours[0]()
    batch.check(out, window, softcap)
    calls: dict[str, Sequence[Call]] = {"": ours}
    row: dict[str, Any] = {"case": name}
    for peer, prepare in peers_of(batch, softcap, window):
        try:
            peer_calls = prepare()
            replayed_us(peer_calls, num_runs=1)  # in a graph, as it will be timed
            hold(peer_calls[0](), out)  # after what those left in a workspace
        except (ImportError, AttributeError, AssertionError, TypeError, ValueError, OSError, RuntimeError) as error:
            row[f"{peer}_error"] = f"{type(error).__name__}: {error}"[:160]
        else:
            calls[f"{peer}_"] = peer_calls
    us = times(calls)
    if batch.new == 1:
        num_bytes = batch.num_bytes * min(window or batch.keys, batch.keys) / batch.keys
        row["tb_per_s"] = round(num_bytes / us[""] / 1e6, 2)
    else:
        row["tflop_per_s"] = round(num_flops(batch, window) / us[""] / 1e6, 1)
    row |= {f"{label}us": value for label, value in us.items()}
    return row | {f"times_{label[:-1]}": round(value / us[""], 3) for label, value in us.items() if label}


def prepare_peers(shape: dict[str, Any]) -> None:
    """Run each peer once on a small batch of this kind."""
    shape = shape | {"seqs": 1, "keys": 1024} | ({"new": 1024} if "new" in shape else {})
    softcap, window = shape.pop("softcap", None), shape.pop("window", None)
    for peer, prepare in peers_of(Batch(**shape), softcap, window):
        try:
            prepare()[0]()
        except (ImportError, AttributeError, AssertionError, TypeError, ValueError, OSError, RuntimeError) as error:
            print(f"{peer} {shape}: {type(error).__name__}: {error}"[:400], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true", help="other head dims, groups, caps and windows")
    parser.add_argument("--prepare", action="store_true", help="have FlashInfer compile, no more")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, shape in (VARIANTS if args.variants else PLAIN).items():
        if args.prepare:
            prepare_peers(shape)
            continue
        rows.append(measure(name, shape))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    if not args.prepare:
        report("attention-variants" if args.variants else "attention-peers", rows)


if __name__ == "__main__":
    main()
