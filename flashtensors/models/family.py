"""What an architecture declares beyond its `ModelConfig`: which norm it uses, and where its checkpoints keep them."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.norm import NormKernel


@dataclass(frozen=True, kw_only=True)
class Family:
    """A pre-norm decoder: x += attention(norm(x)), then x += mlp(norm(x)).

    The names are those of a layer's norms in Hugging Face checkpoints. Sizes, biases, qk-norm, windows, rope and scales
    come from `ModelConfig`.
    """

    norm: NormKernel
    """Every norm of the model."""
    attention_norm: str
    """Before attention."""
    attention_out_norm: str | None = None
    """On what attention adds to the residual; None: there is none."""
    mlp_norm: str
    """Before the MLP."""
    mlp_out_norm: str | None = None
    """On what the MLP adds to the residual; None: there is none."""
