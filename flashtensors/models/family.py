"""What an architecture declares beyond its `ModelConfig`: which norm it uses, and where its checkpoints keep them."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.norm import NormKernel


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Where a layer's experts are in Hugging Face checkpoints."""

    router: str
    experts: str
    """Followed by the number of the expert, and its gate, up or down."""
    gate: str
    up: str
    down: str


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
    experts: ExpertNames | None = None
    """In layers that are mixtures of experts, which `ModelConfig` tells."""
