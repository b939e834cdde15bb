"""What a step's attention has to do, planned on the device: two queues of work items and the memory that splits need.

Shapes: S sequences, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import ConfigError
from ..device_traits import has_early_start, num_multiprocessors, runs_gluon, runs_triton, shared_memory_bytes
from ..fp8 import FP8_DTYPE
from .limits import SHORT_TOKENS, check_batch, check_shape
from .tiles import (
    MOST_PROGRAMS,
    SplitTiles,
    does_stream_pay,
    fit_tiles,
    fixed_tiles,
    long_tiles,
    short_tiles,
    stream_tiles,
)

if TYPE_CHECKING:
    from .groups import GroupTable
    from .stream_queue import StreamQueue

FIXED_CHUNK = 1024
"""Fewest keys of a split in deterministic mode."""

_MOST_FIXED_CHUNKS = 16
"""Most splits of a sequence in deterministic mode: the memory for sums is for as many of every sequence."""

_EVERY = 1 << 30

_TILE_ROWS = 16
"""Rows of a decode tile."""


@dataclass(frozen=True)
class TileShape:
    """How rows lie in a tile of the long queue, for each of `num_units` units of heads that share it."""

    tokens: int
    rows: int
    unit_heads: int
    head_rows: int
    """Rows between two heads."""
    token_rows: int
    """Rows between two tokens."""


class AttentionWork:
    """Work items of a step for layers of one shape and window, and the memory that splits need; made once, refilled.

    Args:
        num_heads: H; at most `SHORT_TOKENS` times K.
        num_kv_heads: K; divides H.
        head_dim: D, at least 16.
        max_seqs: Most sequences in a batch, at most `MAX_SEQS` (`limits.py`).
        max_tokens: Most rows in a batch.
        device: A CUDA device or a CPU. Without Triton's interpreter, a CPU plans nothing and runs
            `ragged_attention_reference`.
        dtype: Of queries and outputs: float32, float16 or bfloat16.
        kv_dtype: Of the caches: float8_e4m3fn, or as queries; None: as queries.
        sliding_window: Tokens that a row sees, its own included, so at least 1; None: all.
        is_causal: Whether a row sees only tokens up to its own.
        is_deterministic: Bitwise the same result for a sequence whatever else is in the batch; costs some speed.
        max_kv_length: Most tokens of a sequence; needed with `is_deterministic` alone.
        max_groups: Most groups of sequences with a shared prefix.
        can_stream: Whether decodes without groups go to the streaming kernel where it is quicker and takes them:
            Hopper, caches in the dtype of queries, not deterministic; see `does_stream_pay`.
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
        max_groups: int = 16,
        can_stream: bool = True,
    ) -> None:
        check_shape(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, max_seqs=max_seqs, max_tokens=max_tokens,
            max_groups=max_groups, dtype=dtype, kv_dtype=kv_dtype or dtype, sliding_window=sliding_window,
        )  # fmt: skip
        if is_deterministic and max_kv_length < 1:
            message = "is_deterministic needs max_kv_length, the most tokens that a sequence can have"
            raise ConfigError(message, param="max_kv_length")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dtype, self.kv_dtype = dtype, kv_dtype or dtype
        self.max_seqs, self.max_tokens, self.max_groups = max_seqs, max_tokens, max_groups
        self.sliding_window, self.is_causal, self.is_deterministic = sliding_window, is_causal, is_deterministic
        self.device = _whole_device(device)
        self.num_processors = num_multiprocessors(self.device, interpreted=4)
        self.is_hopper = _has_hopper_kernel(self.device, dtype, self.kv_dtype, head_dim)
        self.can_stream = can_stream and self.is_hopper and self.kv_dtype == dtype and not is_deterministic
        # pairs are multiplied in fp16, by matrix units that take at least 16 dims
        self.has_pairs_of_fp8 = self.kv_dtype == FP8_DTYPE and dtype != torch.float32 and head_dim >= 32
        self.reads_ahead = False
        self.has_early_start = has_early_start(self.device)
        self.has_pairs = self.is_hopper and num_heads // num_kv_heads % 2 == 0
        self.long_tile = self._long_tile()
        self.short_tiles = self._short_tiles(max_seqs)
        self.long_tiles = self._fitted(long_tiles(head_dim))
        self.stream_tiles = stream_tiles(head_dim)
        self._fixed_chunk = _fixed_chunk(max_kv_length) if is_deterministic else 0
        can_group = is_causal and sliding_window is None and not is_deterministic
        self.has_kernels = runs_triton(self.device)
        if self.has_kernels:
            self._make_queues(max_groups if can_group else 0, max_kv_length)
        self.query_starts: Tensor | None = None
        self.kv_lengths: Tensor | None = None
        self.checked_layout: tuple[object, ...] = ()
        self.has_short = self.has_long = True
        self.has_groups = self.has_stream = False
        self.short_rows = 16

    def _make_queues(self, max_groups: int, max_kv_length: int) -> None:
        from .groups import GroupTable
        from .stream_queue import StreamQueue
        from .work_queue import WorkQueue

        chunks = -(-max_kv_length // self._fixed_chunk) + 1 if self._fixed_chunk else 0
        bounds = {
            "max_seqs": self.max_seqs, "max_tokens": self.max_tokens, "head_dim": self.head_dim, "chunks": chunks,
            "device": self.device, "max_programs": MOST_PROGRAMS * self.num_processors,
        }  # fmt: skip
        tile_tokens = _TILE_ROWS * self.num_kv_heads // self.num_heads
        self.short = WorkQueue(
            num_heads=self.num_kv_heads, tile_tokens=tile_tokens, tile_rows=_TILE_ROWS,
            max_target=MOST_PROGRAMS * self.num_processors, **bounds,
        )  # fmt: skip
        self.stream: StreamQueue | None = None
        if self.can_stream:
            self.stream = StreamQueue(
                max_seqs=self.max_seqs, max_rows=self.max_tokens, num_heads=self.num_kv_heads, head_dim=self.head_dim,
                tile_tokens=tile_tokens, tile_rows=_TILE_ROWS,
                num_programs=self.stream_tiles.programs * self.num_processors,
                device=self.device,
            )  # fmt: skip
        tile = self.long_tile
        max_group_tiles = max_groups + 2 * -(-self.max_seqs // tile.tokens) if max_groups else 0
        self.long = WorkQueue(
            num_heads=self.num_heads // tile.unit_heads, tile_tokens=tile.tokens, tile_rows=tile.rows,
            max_target=self.num_processors * (1 if self.is_hopper else 2), max_groups=max_groups,
            max_group_tiles=max_group_tiles, **bounds,
        )  # fmt: skip
        self.group_table: GroupTable | None = None
        if max_groups:
            self.group_table = GroupTable(
                max_seqs=self.max_seqs, max_groups=max_groups, max_tiles=max_group_tiles, device=self.device
            )

    def _short_tiles(self, num_seqs: int) -> SplitTiles:
        if self.is_deterministic:
            return self._fitted(fixed_tiles(self.head_dim, has_pairs=self.has_pairs_of_fp8))
        return self._fitted(
            short_tiles(
                num_seqs, self.num_kv_heads, self.head_dim, self.num_processors, has_pairs=self.has_pairs_of_fp8
            )
        )

    def _fitted(self, tiles: SplitTiles) -> SplitTiles:
        return fit_tiles(tiles, self.head_dim, self.dtype, self.kv_dtype, shared_memory_bytes(self.device))

    def _long_tile(self) -> TileShape:
        group = self.num_heads // self.num_kv_heads
        if not self.is_hopper:
            return TileShape(tokens=64 // group, rows=64, unit_heads=group, head_rows=1, token_rows=group)
        if self.has_pairs:
            return TileShape(tokens=64, rows=128, unit_heads=2, head_rows=64, token_rows=1)
        return TileShape(tokens=128, rows=128, unit_heads=1, head_rows=0, token_rows=1)

    def plan(
        self,
        query_starts: Tensor,
        kv_lengths: Tensor,
        *,
        groups: Tensor | None = None,
        max_query_tokens: int | None = None,
        min_query_tokens: int | None = None,
        reads_ahead: bool = False,
    ) -> None:
        """Make the items of a batch, on the device; call once a step, before the first layer.

        Sequences without new tokens are padding, wherever they stand.

        Args:
            query_starts: int32 [S + 1], contiguous, as all three; kept for the layers.
            kv_lengths: int32 [S]; kept likewise.
            groups: int32 [G, 3], at most `max_groups` rows (first sequence, number of sequences, tokens of the prefix
                that they share): neighbours whose first pages are the same. The prefix is a multiple of the page size
                and ends before the new tokens of every member; a group inside another has the longer prefix. Rows of
                zeros are padding. Shared keys are computed once for members with up to `SHORT_TOKENS` new tokens; a
                group ends before its first longer member. No effect with a window, `is_deterministic` or without
                causality.
            max_query_tokens: A bound that the caller knows, so that a launch can be spared: 1 for pure decode.
            min_query_tokens: Likewise; above `SHORT_TOKENS` for pure prefill.
            reads_ahead: Whether layers may read the plan, block tables and all keys but those of a sequence's own new
                tokens before the kernel in front of them has ended. True only where no other kernel of this batch
                writes those, and where some kernel behind the plan is launched without programmatic dependent launch.

        Raises:
            ConfigError: More sequences than `max_seqs`; a shape, dtype, stride or device that does not fit.
        """
        check_batch(self, query_starts, kv_lengths, groups)
        self.query_starts, self.kv_lengths, self.reads_ahead = query_starts, kv_lengths, reads_ahead
        self.has_short = min_query_tokens is None or min_query_tokens <= SHORT_TOKENS
        self.has_long = max_query_tokens is None or max_query_tokens > SHORT_TOKENS
        if not self.has_kernels:
            return
        table = self.group_table if groups is not None and self.has_short and kv_lengths.numel() else None
        self.has_groups = table is not None
        if table is not None and groups is not None:
            table.fill(query_starts, groups, tile_tokens=self.long_tile.tokens, short_tokens=SHORT_TOKENS)
        if self.has_short:
            most = SHORT_TOKENS if max_query_tokens is None or self.is_deterministic else max_query_tokens
            rows = most * self.num_heads // self.num_kv_heads
            self.short_rows = min(_TILE_ROWS, 1 << (rows - 1).bit_length())
            self._fill_short(query_starts, kv_lengths, table)
        if self.has_long or self.has_groups:
            self.long.fill(
                query_starts, kv_lengths, min_tokens=SHORT_TOKENS + 1, max_tokens=_EVERY,
                target_items=self.long.max_target, groups=table,
                is_causal=self.is_causal, window=self.sliding_window, fixed_chunk=self._fixed_chunk,
            )  # fmt: skip

    def _fill_short(self, query_starts: Tensor, kv_lengths: Tensor, table: GroupTable | None) -> None:
        can_stream = does_stream_pay(kv_lengths.numel(), self.num_kv_heads, self.head_dim, self.num_processors)
        self.has_stream = self.stream is not None and table is None and can_stream
        if self.stream is not None and self.has_stream:
            self.stream.fill(
                query_starts, kv_lengths, max_tokens=SHORT_TOKENS, is_causal=self.is_causal, window=self.sliding_window
            )
            return
        self.short_tiles = self._short_tiles(kv_lengths.numel())
        self.short.fill(
            query_starts, kv_lengths, min_tokens=1, max_tokens=SHORT_TOKENS,
            target_items=round(self.short_tiles.items * self.num_processors),
            own_begins=None if table is None else table.own_begins, is_causal=self.is_causal,
            window=self.sliding_window, fixed_chunk=self._fixed_chunk,
        )  # fmt: skip


def _whole_device(device: torch.device | str) -> torch.device:
    """The device as tensors name it, whose index is never left out."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fixed_chunk(max_kv_length: int) -> int:
    return max(FIXED_CHUNK, -(-max_kv_length // (_MOST_FIXED_CHUNKS * 64)) * 64)


def _has_hopper_kernel(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> bool:
    # a third warpgroup converts fp8, and leaves the other two too few registers for 256 columns
    head_dims = {dtype: (64, 128, 256), torch.float8_e4m3fn: (64, 128)}.get(kv_dtype, ())
    return dtype in (torch.bfloat16, torch.float16) and head_dim in head_dims and runs_gluon(device)
