"""How a model's weights are laid out: the names it computes with, and the checkpoint tensors they are made of.

A fused weight (q|k|v, gate|up) is a concatenation of rows, so each checkpoint tensor is one contiguous extent of it and
can be read in place.
"""

from __future__ import annotations

import math

import msgspec


class Weight(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor that the model computes with."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    """Names of checkpoint tensors whose rows follow each other in this weight."""
    source_shapes: tuple[tuple[int, ...], ...]
    """Shape that each source must have; all but the first dimension equal `shape`'s."""
    dtype: str | None = None
    """Its dtype in the checkpoint's files and in memory, where it is not the model's: `float8_e4m3fn`, or `float32` of
    scales, which files may have in another float."""
    layer: int | None = None
    """Decoder layer it belongs to; None for embedding, final norm and head."""

    @property
    def num_elements(self) -> int:
        """Elements in the tensor."""
        return math.prod(self.shape)


class WeightLayout(msgspec.Struct, frozen=True, kw_only=True):
    """All weights of a model in execution order: embedding, layer 0 … n - 1, final norm, head.

    A tied head is not listed: the model uses the embedding.
    """

    weights: tuple[Weight, ...]

    def __post_init__(self) -> None:
        """Hold our own invariants: unique names, rows that add up."""
        names = [weight.name for weight in self.weights]
        assert len(set(names)) == len(names), "weight names repeat"
        for weight in self.weights:
            rows = sum(shape[0] for shape in weight.source_shapes)
            assert rows == weight.shape[0], f"{weight.name}: sources have {rows} rows, shape {weight.shape}"
