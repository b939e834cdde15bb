"""Rotary embeddings in a `config.json`, as transformers 4 (`rope_scaling`) and 5 (`rope_parameters`) spell them."""

from __future__ import annotations

import msgspec

from ..errors import UnsupportedModel
from .config_fields import MAX_SIZE, ConfigFields


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True):
    """How rotary frequencies are stretched beyond the trained context."""

    rope_type: str
    """`default`, `linear`, `llama3` or `yarn`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """Of `llama3` and `yarn`: the context before it was stretched."""
    beta_fast: float = 32.0
    """Of `yarn`: waves that turn more often in the original context stay as they are."""
    beta_slow: float = 1.0
    """Of `yarn`: waves that turn less often in the original context are stretched by the whole factor."""
    truncate: bool = True
    """Of `yarn`: the waves in between begin and end at whole indices."""
    attention_factor: float | None = None
    """Of `yarn`: factor on cosines and sines; None: it follows from `factor`, `mscale` and `mscale_all_dim`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None


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


def context_length(fields: ConfigFields, scaling: RopeScaling | None) -> int:
    """Tokens in the longest sequence that a configuration is meant for.

    That is `max_position_embeddings`, or under YaRN `factor` times `original_max_position_embeddings` where that is
    more: the setting for long contexts that the model cards of Qwen2.5 and Qwen3 give adds `rope_scaling` alone and
    leaves `max_position_embeddings` at 32768 or 40960, while other files state the stretched length there. vLLM derives
    the product, too; transformers enforces no length.
    """
    stated = fields.size("max_position_embeddings")
    if scaling is None or scaling.rope_type != "yarn":
        return stated
    return max(stated, int(scaling.factor * scaling.original_max_position_embeddings))


def _rope_object(fields: ConfigFields, key: str, theta: object) -> ConfigFields:
    """The rope parameters under `key`, which may be absent and may leave out the base frequency."""
    defaults = {"rope_theta": theta}
    return fields.find_object(key, defaults=defaults) or ConfigFields({}, defaults=defaults, where=fields.where)


def _parse_rope_scaling(fields: ConfigFields, rope: ConfigFields) -> RopeScaling | None:
    rope_type = rope.find_text("rope_type") or rope.find_text("type") or "default"
    if rope_type not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedModel(
            f"{rope.where}: rope_type {rope_type!r} is not supported; default, linear, llama3 and yarn are"
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
    original = _original_context(fields, rope)
    if rope_type == "yarn":
        return _parse_yarn(rope, original)
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        rope.fail("high_freq_factor", f"above low_freq_factor ({low})")
    return RopeScaling(
        rope_type=rope_type,
        factor=rope.positive("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def _original_context(fields: ConfigFields, rope: ConfigFields) -> int:
    key = "original_max_position_embeddings"
    return fields.find_size(key) or rope.find_size(key) or fields.size("max_position_embeddings")


def _parse_yarn(rope: ConfigFields, original: int) -> RopeScaling:
    factor = rope.positive("factor")
    if not 1 <= factor <= MAX_SIZE / original:
        rope.fail("factor", f"from 1 to {MAX_SIZE} / original_max_position_embeddings")
    if rope.positive("rope_theta") <= 1:
        rope.fail("rope_theta", "above 1")
    beta_fast, beta_slow = rope.find_positive("beta_fast") or 32.0, rope.find_positive("beta_slow") or 1.0
    if beta_fast < beta_slow:
        rope.fail("beta_fast", f"at least beta_slow ({beta_slow})")
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.find("truncate") is None or rope.flag("truncate"),
        attention_factor=rope.find_positive("attention_factor"),
        mscale=_find_mscale(rope, "mscale"),
        mscale_all_dim=_find_mscale(rope, "mscale_all_dim"),
    )


def _find_mscale(rope: ConfigFields, key: str) -> float | None:
    """A number above 0; None when absent, null or 0, with which files say that there is none."""
    return None if rope.find(key) == 0 else rope.find_positive(key)
