"""How a `config.json` describes a mixture of experts."""

from __future__ import annotations

import msgspec

from ..errors import UnsupportedModel
from .config_fields import ConfigFields

MOE_MODEL_TYPES = ("qwen3_moe", "mixtral")
"""`model_type` values whose MLPs are mixtures of experts."""


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The experts that stand in for the MLP, in some layers or in all."""

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    """Of one expert."""
    norm_topk_prob: bool
    """Weights of a token's experts are divided by their sum."""
    layers: tuple[bool, ...]
    """For each layer, whether it has experts; the others have a plain MLP."""


def parse_experts(fields: ConfigFields, model_type: str, num_layers: int) -> ExpertsConfig | None:
    """The experts of a mixture; None where `model_type` is none. Raises as `parse_config`."""
    if model_type not in MOE_MODEL_TYPES:
        return None
    if fields.find_text("hidden_act") != "silu":
        raise UnsupportedModel(
            f"{fields.where}: hidden_act {fields.find('hidden_act')!r} is not supported in experts; silu is"
        )
    # transformers 5 writes every architecture's number of experts as num_local_experts
    num_experts = fields.find_size("num_local_experts") or fields.size("num_experts")
    is_mixtral = model_type == "mixtral"
    return ExpertsConfig(
        num_experts=num_experts,
        num_experts_per_tok=fields.size("num_experts_per_tok", maximum=num_experts),
        intermediate_size=fields.size("intermediate_size" if is_mixtral else "moe_intermediate_size"),
        norm_topk_prob=is_mixtral or fields.flag("norm_topk_prob"),
        layers=(True,) * num_layers if is_mixtral else _sparse_layers(fields, num_layers),
    )


def _sparse_layers(fields: ConfigFields, num_layers: int) -> tuple[bool, ...]:
    step = fields.size("decoder_sparse_step")
    plain = fields.find("mlp_only_layers") or []
    if not isinstance(plain, list) or any(type(layer) is not int for layer in plain):
        fields.fail("mlp_only_layers", "a list of layers")
    return tuple((layer + 1) % step == 0 and layer not in plain for layer in range(num_layers))
