"""How near to the rate of a copy is one launch from the q|k|v projection to rotated queries and a filled cache?

Each row is one (model shape, number of tokens, variant) in bf16, tokens of one sequence in pages of 64 in random order.
Bytes are those of q, k, v read and written (an fp8 cache counts one byte), and of the angles read. Beside it, in the
same run: torch's operations, and FlashInfer's kernels one after the other where they can be imported. Before timing,
queries and cache are held to fp64.

    python benchmarks/kernels/bench_rope_append.py [--heads 0 4 8 16] [--warps 0 1 2 4]      (0: the default)
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import report
from timing import DEVICE, DTYPE, check, compare, copy_bytes_per_us, num_sets, random

from flashtensors.kernels.fp8 import FP8_DTYPE
from flashtensors.kernels.rope import Rotation, apply_rope, inverse_frequencies, rotation
from flashtensors.kernels.rope_append import KvScales, QkNorm, quantise_kv, rope_append_reference
from flashtensors.kernels.rope_append_kernel import launch_rope_append

PAGE_SIZE = 64
NUM_TOKENS = [1, 32, 512, 8192]


@dataclass(frozen=True)
class Shape:
    """Heads of a model, and what happens to them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_norm: bool
    is_fp8: bool = False


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128, has_norm=False),
    "qwen3-8b": Shape(32, 8, 128, has_norm=True),
    "qwen3-8b, fp8 cache": Shape(32, 8, 128, has_norm=True, is_fp8=True),
    "gemma-3-4b": Shape(8, 4, 256, has_norm=True),
    "llama-3.2-1b": Shape(32, 8, 64, has_norm=False),
}


class Case:
    """Inputs of one shape and number of tokens, and what is done with them."""

    def __init__(self, shape: Shape, num_tokens: int) -> None:
        self.shape, self.num_tokens = shape, num_tokens
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.positions = torch.arange(num_tokens, device=DEVICE)
        frequencies = inverse_frequencies(head_dim, 500000.0).to(DEVICE)
        self.rotation = rotation(self.positions, frequencies, DTYPE)
        num_pages = -(-num_tokens // PAGE_SIZE)
        self.pages = torch.randperm(num_pages).to(DEVICE)
        self.slots = self.pages[self.positions // PAGE_SIZE] * PAGE_SIZE + self.positions % PAGE_SIZE
        self.norm = (
            QkNorm(q_weight_D=random(head_dim), k_weight_D=random(head_dim), eps=1e-6) if shape.has_norm else None
        )
        scale_K = torch.full((num_kv_heads,), 0.05, device=DEVICE)
        self.scales = KvScales(k_scale_K=scale_K, v_scale_K=scale_K) if shape.is_fp8 else None
        width = (num_heads + 2 * num_kv_heads) * head_dim
        cache_itemsize = 1 if shape.is_fp8 else DTYPE.itemsize
        kv_elements, q_elements = 2 * num_kv_heads * head_dim, num_heads * head_dim
        self.num_bytes = num_tokens * (
            width * DTYPE.itemsize
            + q_elements * DTYPE.itemsize
            + kv_elements * cache_itemsize
            + head_dim * DTYPE.itemsize
        )
        cache_shape = (num_pages, num_kv_heads, PAGE_SIZE, head_dim)
        cache_dtype = FP8_DTYPE if shape.is_fp8 else DTYPE
        self.sets = [
            (
                random(num_tokens, width),
                torch.zeros(cache_shape, device=DEVICE).to(cache_dtype),
                torch.zeros(cache_shape, device=DEVICE).to(cache_dtype),
                torch.empty(num_tokens, num_heads, head_dim, dtype=DTYPE, device=DEVICE),
            )
            for _ in range(num_sets(self.num_bytes))
        ]

    def run(self, inputs: tuple[Tensor, ...], options: dict[str, int | None]) -> None:
        """Ours."""
        qkv, k_cache, v_cache, out = inputs
        launch_rope_append(
            qkv, self.rotation, k_cache, v_cache, self.slots, out, None, self.norm, self.scales, **options
        )

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q, k and v."""
        counts = (self.shape.num_heads, self.shape.num_kv_heads, self.shape.num_kv_heads)
        q, k, v = qkv.unflatten(-1, (-1, self.shape.head_dim)).split(counts, dim=1)
        return q, k, v

    def run_torch(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The parts in torch; nothing waits for the device."""
        qkv, k_cache, v_cache, _ = inputs
        q, k, v = self.heads(qkv)
        if self.norm is not None:
            q = F.rms_norm(q, q.shape[-1:], self.norm.q_weight_D, self.norm.eps)
            k = F.rms_norm(k, k.shape[-1:], self.norm.k_weight_D, self.norm.eps)
        q, k = apply_rope(q, self.rotation), apply_rope(k, self.rotation)
        if self.scales is not None:
            k, v = quantise_kv(k, self.scales.k_scale_K), quantise_kv(v, self.scales.v_scale_K)
        pages, offsets = self.slots // PAGE_SIZE, self.slots % PAGE_SIZE
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.view(torch.int8)[pages, :, offsets] = new.contiguous().view(torch.int8)
        return q

    def run_flashinfer(self, inputs: tuple[Tensor, ...], tables: dict[str, Tensor]) -> None:
        """Norm of q, norm of k, rope in place, append: up to four kernels, on views of `qkv`."""
        import flashinfer

        qkv, k_cache, v_cache, _ = inputs
        q, k, v = self.heads(qkv)
        if self.norm is not None:
            flashinfer.norm.rmsnorm(q, self.norm.q_weight_D, self.norm.eps, out=q)
            flashinfer.norm.rmsnorm(k, self.norm.k_weight_D, self.norm.eps, out=k)
        flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(
            self.positions, q.flatten(1), k.flatten(1), q.shape[-1], tables["cos_sin"], is_neox=True
        )
        flashinfer.append_paged_kv_cache(
            k,
            v,
            tables["batch_indices"],
            tables["positions"],
            (k_cache, v_cache),
            tables["pages"],
            tables["page_starts"],
            tables["last_page_length"],
            kv_layout="HND",
        )

    def flashinfer_tables(self) -> dict[str, Tensor]:
        """What FlashInfer takes instead of slots and rotation."""
        half = self.shape.head_dim // 2
        cos, sin = self.rotation.cos_T1D[:, 0, :half], self.rotation.sin_T1D[:, 0, half:]
        last = self.num_tokens - (len(self.pages) - 1) * PAGE_SIZE
        return {
            "cos_sin": torch.cat((cos, sin), -1).float(),
            "batch_indices": torch.zeros(self.num_tokens, dtype=torch.int32, device=DEVICE),
            "positions": self.positions.int(),
            "pages": self.pages.int(),
            "page_starts": torch.tensor([0, len(self.pages)], dtype=torch.int32, device=DEVICE),
            "last_page_length": torch.tensor([last], dtype=torch.int32, device=DEVICE),
        }

    def check(self, options: dict[str, int | None]) -> None:
        """Hold queries and keys to the reference in fp64."""
        qkv, k_cache, v_cache, out = self.sets[0]
        self.run(self.sets[0], options)
        cos, sin = self.rotation.cos_T1D.double(), self.rotation.sin_T1D.double()
        norm = self.norm
        if norm is not None:
            norm = QkNorm(q_weight_D=norm.q_weight_D.double(), k_weight_D=norm.k_weight_D.double(), eps=norm.eps)
        exact_k, exact_v = (
            torch.zeros_like(k_cache, dtype=torch.float64),
            torch.zeros_like(v_cache, dtype=torch.float64),
        )
        exact_q = rope_append_reference(
            qkv.double(),
            Rotation(cos_T1D=cos, sin_T1D=sin),
            exact_k,
            exact_v,
            self.slots,
            num_heads=self.shape.num_heads,
            norm=norm,
        )
        scale = 1.0 if self.scales is None else 0.05
        tolerance = 0.02 if self.scales is None else 0.07
        check("queries", out, exact_q, 0.06)  # heads are rounded after their norm, and rope subtracts what it turns
        check("keys", k_cache.float() * scale, exact_k, tolerance)
        check("values", v_cache.float() * scale, exact_v, tolerance)

    def measure(self, copy_rate: float, options: dict[str, int | None]) -> dict[str, Any]:
        """Check, then time."""
        self.check(options)
        peers = {"torch": [lambda s=s: self.run_torch(s) for s in self.sets]}
        if not self.shape.is_fp8:
            tables = self.flashinfer_tables()
            peers["flashinfer"] = [lambda s=s: self.run_flashinfer(s, tables) for s in self.sets]
        return compare([lambda s=s: self.run(s, options) for s in self.sets], self.num_bytes, copy_rate, peers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", type=int, default=[0], help="heads of a program")
    parser.add_argument("--warps", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    copy_rate = copy_bytes_per_us()
    rows: list[dict[str, Any]] = []
    for (name, shape), num_tokens in itertools.product(SHAPES.items(), NUM_TOKENS):
        case = Case(shape, num_tokens)
        for heads, warps in itertools.product(args.heads, args.warps):
            measured = case.measure(copy_rate, {"heads_per_program": heads or None, "num_warps": warps or None})
            rows.append({"shape": name, "tokens": num_tokens, "heads": heads, "warps": warps, **measured})
            print(rows[-1], flush=True)
    report("rope_append", rows, copy_tb_per_s=round(copy_rate / 1e6, 3))


if __name__ == "__main__":
    main()
