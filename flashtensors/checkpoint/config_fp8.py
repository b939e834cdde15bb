"""How a `config.json` describes weights in fp8 (e4m3): which layers have them, and where their scales are.

A weight is `value * scale`, with one scale for each output row or for each block of 128 x 128 elements. Activations are
never quantised by numbers from a file: kernels that multiply in fp8 take the scale of each row as it comes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from ..errors import UnsupportedModel
from .config_fields import ConfigFields

FP8_BLOCK = 128
"""Rows and columns of a block that has a scale of its own, where rows have none."""

_READABLE = (
    "fp8 (e4m3) weights with a scale for each block of 128 x 128 (quant_method fp8 or compressed-tensors) or for each "
    "row (compressed-tensors or fbgemm_fp8), without static scales of activations"
)
_PATTERN = re.compile(r"(?:[A-Za-z0-9_-]|\.\*|\\?\.)+")
"""Regular expressions of names that are understood: letters, dots, and `.*`."""


class Fp8Config(msgspec.Struct, frozen=True, kw_only=True):
    """Projections whose weights are fp8; embeddings, norms, routers and the head never are."""

    is_blockwise: bool
    """A scale for each block of `FP8_BLOCK` x `FP8_BLOCK` elements; otherwise for each row."""
    scale_name: str
    """What a weight's scales are called beside `weight`."""
    kept: tuple[str, ...] = ()
    """Modules that are in the model's dtype: globs of their full names."""

    def covers(self, module: str) -> bool:
        """Whether a projection, by its full name in the checkpoint, is in fp8."""
        return not any(fnmatch.fnmatchcase(module, pattern) for pattern in self.kept)


def fp8_config() -> dict[str, object]:
    """The `quantization_config` of weights with a scale for each row, as other engines read it too."""
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations},
        },
        "ignore": ["lm_head"],
    }


def parse_fp8(fields: ConfigFields) -> Fp8Config | None:
    """The quantisation of a configuration; None where it has none.

    Raises:
        UnsupportedModel: A scheme that does not run here; the message says which do.
        CheckpointError: A value of the wrong type.
    """
    quantization = fields.find_object("quantization_config")
    if quantization is None:
        return None
    method = quantization.find("quant_method")
    if method == "fp8":
        return _parse_finegrained(quantization)
    if method == "fbgemm_fp8":
        kept = _names(quantization, "modules_to_not_convert")
        return Fp8Config(is_blockwise=False, scale_name="weight_scale", kept=kept)
    if method == "compressed-tensors":
        return _parse_compressed(quantization)
    _refuse(quantization, f"weights are quantised with {method!r}")


def _parse_finegrained(quantization: ConfigFields) -> Fp8Config:
    """The scheme that DeepSeek and Qwen publish in."""
    if quantization.find("weight_block_size") != [FP8_BLOCK, FP8_BLOCK]:
        _refuse(quantization, f"weight_block_size is {quantization.find('weight_block_size')!r}")
    if quantization.find("activation_scheme") not in (None, "dynamic"):
        _refuse(quantization, f"activation_scheme is {quantization.find('activation_scheme')!r}")
    if quantization.find("fmt") not in (None, "e4m3"):
        _refuse(quantization, f"fmt is {quantization.find('fmt')!r}")
    kept = _names(quantization, "modules_to_not_convert")
    return Fp8Config(is_blockwise=True, scale_name="weight_scale_inv", kept=kept)


def _parse_compressed(quantization: ConfigFields) -> Fp8Config:
    if quantization.find("kv_cache_scheme") is not None:
        _refuse(quantization, "kv_cache_scheme is set")
    groups = quantization.find_object("config_groups")
    names = [] if groups is None else groups.keys()
    group = groups.find_object(names[0]) if groups is not None and len(names) == 1 else None
    if group is None or group.find("targets") != ["Linear"]:
        _refuse(quantization, "config_groups is not one group that targets Linear")
    weights, activations = group.find_object("weights"), group.find_object("input_activations")
    if weights is None or (weights.find("type"), weights.find("num_bits")) != ("float", 8):
        _refuse(quantization, "weights are not 8-bit floats")
    if activations is not None and activations.find("dynamic") is not True:
        _refuse(quantization, "input_activations are not dynamic")
    strategy = weights.find("strategy")
    is_blockwise = strategy == "block" and weights.find("block_structure") == [FP8_BLOCK, FP8_BLOCK]
    if strategy != "channel" and not is_blockwise:
        _refuse(quantization, f"strategy of weights is {strategy!r}")
    return Fp8Config(is_blockwise=is_blockwise, scale_name="weight_scale", kept=_names(quantization, "ignore"))


def _names(quantization: ConfigFields, key: str) -> tuple[str, ...]:
    """Globs of the modules in a list of names, ends of names, and `re:` expressions."""
    names = quantization.find(key)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        quantization.fail(key, "a list of names")
    return tuple(glob for name in names for glob in _globs(quantization, name))


def _globs(quantization: ConfigFields, name: str) -> Sequence[str]:
    if not name.startswith("re:"):
        plain = name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]")
        return (plain, f"{plain}.*", f"*.{plain}")
    # A stranger's expression may run for ever; a glob of names does not.
    text = name.removeprefix("re:").removeprefix("^")
    stem = text.removesuffix("$")
    if _PATTERN.fullmatch(stem) is None:
        _refuse(quantization, f"{name!r} is more than letters, dots and .*")
    glob = stem.replace("\\.", "\0").replace(".*", "*").replace(".", "?").replace("\0", ".")
    return (glob if text != stem else f"{glob}*",)


def _refuse(quantization: ConfigFields, problem: str) -> NoReturn:
    raise UnsupportedModel(
        f"{quantization.where}: {problem}, which does not run here; what does is {_READABLE}. Pull the unquantised "
        "model, or a GGUF of it"
    )
