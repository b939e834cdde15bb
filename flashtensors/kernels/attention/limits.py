"""Which works attention can be planned for, and which batches: refused here by name, on every device alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import ConfigError
from ..arguments import require, require_that
from ..fp8 import FP8_DTYPE

if TYPE_CHECKING:
    from .work import AttentionWork

SHORT_TOKENS = 16
"""Most new tokens of a sequence that decode tiles take, and most query heads of a key-value head."""

MAX_SEQS = 4096
"""Most sequences of a step: one block holds what is planned of all of them."""

_LEAST_HEAD_DIM = 16
"""Matrix units multiply no fewer."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_shape(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seqs: int,
    max_tokens: int,
    max_groups: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    sliding_window: int | None,
) -> None:
    """Refuse a work that no kernel computes; arguments as `AttentionWork` takes them.

    Raises:
        ConfigError: An argument by its name, what it is and what it must be.
    """
    require_that(num_kv_heads >= 1, "num_kv_heads", num_kv_heads, "at least 1")
    allowed = f"a multiple of num_kv_heads {num_kv_heads}, at most {SHORT_TOKENS} times it; attend more heads in parts"
    is_group = 1 <= num_heads // num_kv_heads <= SHORT_TOKENS and num_heads % num_kv_heads == 0
    require_that(is_group, "num_heads", num_heads, allowed)
    require_that(head_dim >= _LEAST_HEAD_DIM, "head_dim", head_dim, f"at least {_LEAST_HEAD_DIM}")
    most = f"from 1 to {MAX_SEQS}, for which a step can be planned; of an engine, lower max_num_seqs"
    require_that(1 <= max_seqs <= MAX_SEQS, "max_seqs", max_seqs, most)
    require_that(max_tokens >= 1, "max_tokens", max_tokens, "at least 1")
    require_that(max_groups >= 0, "max_groups", max_groups, "at least 0")
    require_that(dtype in _DTYPES, "dtype", dtype, " or ".join(map(str, _DTYPES)))
    require_that(kv_dtype in (dtype, FP8_DTYPE), "kv_dtype", kv_dtype, f"{dtype}, as dtype, or {FP8_DTYPE}")
    is_window = sliding_window is None or sliding_window >= 1
    require_that(is_window, "sliding_window", sliding_window, "at least 1, the row's own token, or None for all tokens")


def check_batch(work: AttentionWork, query_starts: Tensor, kv_lengths: Tensor, groups: Tensor | None) -> None:
    """Refuse a batch that does not fit `work`.

    Raises:
        ConfigError: As `check_shape`.
    """
    num_seqs = max(query_starts.numel() - 1, 0)
    if num_seqs > work.max_seqs:
        raise ConfigError(
            f"the batch has {num_seqs} sequences, but the work was made for at most {work.max_seqs}; "
            "make it with a larger max_seqs, or split the batch",
            param="query_starts",
        )
    require("query_starts", query_starts, torch.int32, (num_seqs + 1,), work.device)
    require("kv_lengths", kv_lengths, torch.int32, (num_seqs,), work.device)
    if groups is not None:
        require("groups", groups, torch.int32, (*groups.shape[:1], 3), work.device)
        most = f"at most {work.max_groups}, max_groups of the work"
        require_that(len(groups) <= work.max_groups, "groups", f"{len(groups)} rows", most)
