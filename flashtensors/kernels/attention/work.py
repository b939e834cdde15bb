"""What a step's attention has to do, planned on the device: two queues of work items and the memory that splits need.

Shapes: S sequences, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...errors import ConfigError
from .work_queue import WorkQueue, max_items_for

SHORT_TOKENS = 16
"""Most new tokens of a sequence that decode tiles take."""

FIXED_CHUNK = 1024
"""Keys of a split in deterministic mode."""

SHORT_PROGRAMS = 2
"""Programs of the decode kernel for each multiprocessor. One has too few bytes in flight (64 sequences of 8k tokens:
523 µs), three or four disturb each other's pages (530, 579 µs), two take 476 µs on an H200. Where there are fewer tiles
than multiprocessors, splitting aims at one item each: what more items gain, merging them costs."""

_EVERY = 1 << 30


class AttentionWork:
    """Work items of a step for layers of one shape and window, and the memory that splits need; made once, refilled.

    Args:
        num_heads: H.
        num_kv_heads: K; divides H.
        head_dim: D.
        max_seqs: Most sequences in a batch, at most 4096.
        max_tokens: Most rows in a batch.
        device: A CUDA device (or `cpu` under Triton's interpreter).
        dtype: Of queries and outputs.
        kv_dtype: Of the caches; None: as queries.
        sliding_window: Tokens that a row sees, its own included; None: all.
        is_causal: Whether a row sees only tokens up to its own; False for shared prefixes.
        is_deterministic: Bitwise the same result for a sequence whatever else is in the batch; costs some speed.
        max_kv_length: Most tokens of a sequence; needed with `is_deterministic` alone.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_seqs: int,
        max_tokens: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
        kv_dtype: torch.dtype | None = None,
        sliding_window: int | None = None,
        is_causal: bool = True,
        is_deterministic: bool = False,
        max_kv_length: int = 0,
    ) -> None:
        group = num_heads // num_kv_heads
        if num_heads % num_kv_heads or group > SHORT_TOKENS:
            raise ConfigError(
                f"num_heads is {num_heads}, but it must be a multiple of num_kv_heads {num_kv_heads}, "
                f"at most {SHORT_TOKENS} times it"
            )
        if is_deterministic and max_kv_length < 1:
            raise ConfigError("is_deterministic needs max_kv_length, the most tokens that a sequence can have")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dtype, self.kv_dtype = dtype, kv_dtype or dtype
        self.max_seqs, self.max_tokens = max_seqs, max_tokens
        self.sliding_window, self.is_causal, self.is_deterministic = sliding_window, is_causal, is_deterministic
        self.device = torch.device(device)
        self.num_processors = _num_processors(self.device)
        self.is_hopper = self.kv_dtype == dtype and _is_hopper(self.device, dtype, head_dim)
        self.has_pairs = self.is_hopper and group % 2 == 0
        self._fixed_chunk = FIXED_CHUNK if is_deterministic else 0
        self._chunks = -(-max_kv_length // FIXED_CHUNK) + 1 if is_deterministic else 0
        self.short_tile = 16 // group
        self.short = self._queue(num_kv_heads, self.short_tile, self.num_processors, 16)
        self.long_heads, self.long_tile, self.long_rows = self._long_shape(group)
        self.long_programs = self.num_processors * (1 if self.is_hopper else 2)
        self.long = self._queue(self.long_heads, self.long_tile, self.long_programs, self.long_rows)
        self.query_starts: Tensor | None = None
        self.has_short = self.has_long = True
        self.short_rows = 16

    def _long_shape(self, group: int) -> tuple[int, int, int]:
        """Heads, tokens and rows of a long tile."""
        if not self.is_hopper:
            return self.num_kv_heads, 64 // group, 64
        if self.has_pairs:
            return self.num_heads // 2, 64, 128
        return self.num_heads, 128, 128

    def _queue(self, heads: int, tile_tokens: int, target_items: int, tile_rows: int) -> WorkQueue:
        max_items = max_items_for(
            max_seqs=self.max_seqs,
            max_tokens=self.max_tokens,
            tile_tokens=tile_tokens,
            num_heads=heads,
            target_items=target_items,
            chunks=self._chunks,
        )
        return WorkQueue(
            max_items=max_items, num_heads=heads, tile_rows=tile_rows, head_dim=self.head_dim, device=self.device
        )

    def plan(
        self,
        query_starts: Tensor,
        kv_lengths: Tensor,
        *,
        kv_starts: Tensor | None = None,
        max_query_tokens: int | None = None,
        min_query_tokens: int | None = None,
    ) -> None:
        """Make the items of a batch, on the device; call once a step, before the first layer.

        Args:
            query_starts: int32 [S + 1]; kept for the layers.
            kv_lengths: int32 [S].
            kv_starts: int32 [S]: tokens before it are attended elsewhere (a shared prefix); None: none are.
            max_query_tokens: A bound that the caller knows, so that a launch can be spared: 1 for pure decode.
            min_query_tokens: Likewise; above `SHORT_TOKENS` for pure prefill.
        """
        self.query_starts = query_starts
        self.has_short = min_query_tokens is None or min_query_tokens <= SHORT_TOKENS
        self.has_long = max_query_tokens is None or max_query_tokens > SHORT_TOKENS
        shared = {
            "kv_starts": kv_starts,
            "is_causal": self.is_causal,
            "window": self.sliding_window,
            "fixed_chunk": self._fixed_chunk,
        }
        if self.has_short:
            most = SHORT_TOKENS if max_query_tokens is None else min(max_query_tokens, SHORT_TOKENS)
            group = self.num_heads // self.num_kv_heads
            self.short_rows = min(16, triton.next_power_of_2(most * group))
            self.short.fill(
                query_starts, kv_lengths, tile_tokens=self.short_tile, min_tokens=1, max_tokens=SHORT_TOKENS,
                target_items=self.num_processors, **shared,
            )  # fmt: skip
        if self.has_long:
            self.long.fill(
                query_starts, kv_lengths, tile_tokens=self.long_tile, min_tokens=SHORT_TOKENS + 1, max_tokens=_EVERY,
                target_items=self.long_programs, **shared,
            )  # fmt: skip


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _is_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    is_sm90 = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return is_sm90 and dtype in (torch.bfloat16, torch.float16) and head_dim in (64, 128, 256)
