"""How every row of a batch draws, as tensors on the device: one set of launches serves any mix of rows.

Shapes: S rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import ConfigError
from .sampling import Draws

_DTYPES = {
    "temperature_S": torch.float32,
    "top_k_S": torch.int64,
    "top_p_S": torch.float64,
    "min_p_S": torch.float32,
    "seed_S": torch.int64,
    "position_S": torch.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """Sampling parameters of S rows; contiguous tensors of one device, so that a CUDA graph may read new values."""

    temperature_S: Tensor
    """float32; 0 is greedy."""
    top_k_S: Tensor
    """int64; 0, or more than the vocabulary, keeps all."""
    top_p_S: Tensor
    """float64 in (0, 1]."""
    min_p_S: Tensor
    """float32 in [0, 1]."""
    seed_S: Tensor
    """int64."""
    position_S: Tensor
    """int64: of the token that is drawn, in its sequence."""

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device | str) -> SamplingRows:
        """Rows that take the first largest logit."""
        rows = {name: torch.zeros(num_rows, dtype=dtype, device=device) for name, dtype in _DTYPES.items()}
        rows["top_p_S"].fill_(1.0)
        return cls(**rows)

    def part(self, begin: int, end: int) -> SamplingRows:
        """Some neighbouring rows; the same memory."""
        return SamplingRows(**{name: getattr(self, name)[begin:end] for name in _DTYPES})

    @classmethod
    def from_draws(cls, draws: list[Draws], num_rows: int, device: torch.device) -> SamplingRows:
        """The same draws as `sampling.sample` takes; rows in none of them are greedy."""
        if len(draws) == 1 and len(draws[0].rows_R) == num_rows:
            return cls(**{name: getattr(draws[0], f"{name[:-2]}_R") for name in _DTYPES})
        rows = cls.greedy(num_rows, device)
        for group in draws:
            for name in _DTYPES:
                getattr(rows, name).index_copy_(0, group.rows_R, getattr(group, f"{name[:-2]}_R"))
        return rows

    def to_draws(self, vocab_size: int) -> list[Draws]:
        """Groups for `sampling.sample`; waits for the device."""
        host = {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}
        is_truncated = ((host["top_k_S"] > 0) & (host["top_k_S"] < vocab_size)) | (host["top_p_S"] < 1.0)
        is_drawn = host["temperature_S"] > 0
        groups = []
        for is_member in (is_drawn & ~is_truncated, is_drawn & is_truncated):
            index = is_member.nonzero()[0]
            if len(index):
                columns = {name[:-2]: values[index] for name, values in host.items()}
                columns["top_k"] = columns["top_k"] * (columns["top_k"] < vocab_size)
                groups.append(Draws.of(rows=index, device=self.seed_S.device, **columns))
        return groups

    def check(self, num_rows: int, device: torch.device) -> None:
        """Raise `ConfigError` for the first tensor that kernels could not read."""
        for name, dtype in _DTYPES.items():
            require(name, getattr(self, name), dtype, (num_rows,), device)


def require(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise `ConfigError` unless `x` is contiguous with this dtype, shape and device."""
    if x.dtype != dtype or x.shape != shape or x.device != device or not x.is_contiguous():
        raise ConfigError(
            f"{name} is {x.dtype} {list(x.shape)} with strides {x.stride()} on {x.device}, but it must be contiguous "
            f"{dtype} {list(shape)} on {device}"
        )
