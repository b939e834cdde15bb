"""Rotary embeddings in a `config.json`, as transformers 4 (`rope_scaling`) and 5 (`rope_parameters`) spell them."""

from __future__ import annotations

import msgspec

from ..errors import UnsupportedModel
from .config_fields import ConfigFields


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How rotary frequencies are stretched beyond the trained context."""

    rope_type: str
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def parse_rope(fields: ConfigFields, *, is_gemma: bool) -> tuple[float, RopeScaling | None, float | None]:
    """Base frequency, scaling, and the base frequency of sliding-window layers."""
    if not is_gemma:
        key = "rope_scaling" if fields.find("rope_scaling") else "rope_parameters"
        rope = _rope_object(fields, key, fields.find("rope_theta"))
        return rope.positive("rope_theta"), _parse_rope_scaling(fields, rope), None
    by_layer_type = fields.find_object("rope_parameters") or fields
    full = _rope_object(by_layer_type, "full_attention", fields.find("rope_theta"))
    if fields.find("rope_scaling") is not None:
        full = _rope_object(fields, "rope_scaling", full.find("rope_theta"))
    local = _rope_object(by_layer_type, "sliding_attention", fields.find("rope_local_base_freq"))
    if _parse_rope_scaling(fields, local) is not None:
        raise UnsupportedModel(f"{fields.where}: rope of sliding_attention layers is scaled, which does not run here")
    return full.positive("rope_theta"), _parse_rope_scaling(fields, full), local.positive("rope_theta")


def _rope_object(fields: ConfigFields, key: str, theta: object) -> ConfigFields:
    """The rope parameters under `key`, which may be absent and may leave out the base frequency."""
    defaults = {"rope_theta": theta}
    return fields.find_object(key, defaults=defaults) or ConfigFields({}, defaults=defaults, where=fields.where)


def _parse_rope_scaling(fields: ConfigFields, rope: ConfigFields) -> RopeScaling | None:
    rope_type = rope.find_text("rope_type") or rope.find_text("type") or "default"
    if rope_type not in ("default", "linear", "llama3"):
        raise UnsupportedModel(
            f"{rope.where}: rope_type {rope_type!r} is not supported; default, linear and llama3 are"
        )
    for owner in (fields, rope):
        if owner.find("partial_rotary_factor") not in (None, 1.0):
            raise UnsupportedModel(f"{owner.where}: partial_rotary_factor is set; only whole heads are rotated here")
    if rope.find("full_attention") is not None or rope.find("sliding_attention") is not None:
        raise UnsupportedModel(f"{rope.where}: rope parameters by layer type are supported for gemma3_text alone")
    if rope_type == "default":
        return None
    if rope_type == "linear":
        return RopeScaling(rope_type=rope_type, factor=rope.positive("factor"))
    original = "original_max_position_embeddings"
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        rope.fail("high_freq_factor", f"above low_freq_factor ({low})")
    return RopeScaling(
        rope_type=rope_type,
        factor=rope.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=rope.find_size(original) or fields.size("max_position_embeddings"),
    )
