"""Rows of an embedding table, scaled where the family scales them (Gemma: by the root of the hidden size).

An id outside the table gives zeros, so padding rows of a captured graph need no valid id.

Shapes: T ids, V vocabulary, E hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError


def embed(token_ids_T: Tensor, table_VE: Tensor, *, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """`scale * table_VE[token_ids_T]`, `[T, E]`, rounded once.

    Args:
        token_ids_T: int64 or int32.
        table_VE: Last stride 1.
        scale: Already rounded to the dtype of the table, where the family rounds it.
        out: Last stride 1; None: a new tensor.

    Raises:
        ConfigError: An argument whose shape, dtype, stride or device does not fit, by name.
    """
    shape = (*token_ids_T.shape, table_VE.shape[-1])
    if token_ids_T.dim() != 1 or token_ids_T.dtype not in (torch.int32, torch.int64):
        raise ConfigError(f"token_ids_T is {token_ids_T.dtype} {list(token_ids_T.shape)}, not int32 or int64 [T]")
    if table_VE.dim() != 2 or table_VE.stride(-1) != 1 or table_VE.device != token_ids_T.device:
        raise ConfigError(
            f"table_VE is {list(table_VE.shape)} with strides {table_VE.stride()} on {table_VE.device}, but it must be "
            f"[V, E] with last stride 1 on {token_ids_T.device}"
        )
    if out is not None and (out.shape != shape or out.dtype != table_VE.dtype or out.stride(-1) != 1):
        raise ConfigError(
            f"out is {out.dtype} {list(out.shape)} with strides {out.stride()}, but it must be {table_VE.dtype} "
            f"{list(shape)} with last stride 1"
        )
    if table_VE.is_cuda:
        from .embedding_kernel import launch_embed

        out = torch.empty(shape, dtype=table_VE.dtype, device=table_VE.device) if out is None else out
        return launch_embed(token_ids_T, table_VE, scale, out)
    rows_TE = embed_reference(token_ids_T, table_VE, scale=scale)
    return rows_TE if out is None else out.copy_(rows_TE)


def embed_reference(token_ids_T: Tensor, table_VE: Tensor, *, scale: float = 1.0) -> Tensor:
    """`embed` in torch."""
    is_known_T = (token_ids_T >= 0) & (token_ids_T < table_VE.shape[0])
    rows_TE = F.embedding(token_ids_T.where(is_known_T, 0), table_VE)
    return rows_TE.mul_(scale).masked_fill_(~is_known_T[:, None], 0.0)
