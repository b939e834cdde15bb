"""Conversion of GGUF files into bf16 safetensors beside the JSON files of a Hugging Face checkpoint.

Weights are dequantised to fp32 by the `gguf` library and rounded to bf16 once. What llama.cpp's converter did is
undone: it interleaves the rows of q and k in Llama models, and adds 1 to Gemma's norms.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from ..errors import CheckpointError, HeaderError, TruncatedFile, UnsupportedModel
from .architecture import ModelConfig, parse_config
from .durable import disk_errors
from .gguf_config import find_rope_factors, make_config, make_generation_config
from .gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from .gguf_tokenizer import make_tokenizer, make_tokenizer_config
from .safetensors import INDEX_FILE, SINGLE_FILE, TensorToWrite, write_safetensors
from .tensor_names import tensor_shapes

MAX_SHARD_BYTES = 5 * 1000**3
"""Largest file of weights that is written; a larger model gets several and an index."""

Progress = Callable[[int, int], None]
"""Called with bytes of bf16 written so far and bytes in all."""

_SLAB_ELEMENTS = 4 * 1024**2
_BF16_BYTES = 2
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = {
    **_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def convert_gguf(paths: Sequence[Path], out_folder: Path, progress: Progress | None = None) -> None:
    """Write the model in `paths` to `out_folder` as safetensors, configuration and tokenizer.

    Tensors follow each other in the order in which a forward pass needs them. The folder is made when it is missing; it
    belongs to the caller, who throws it away when this raises.

    Args:
        paths: One file, or all parts of a split one, in any order.
        out_folder: Where to write.
        progress: See `Progress`.

    Raises:
        HeaderError, TruncatedFile: A file is damaged.
        UnsupportedModel: An architecture, tokenizer or quantisation that does not run here.
        CheckpointError: A part or a tensor is missing, or has another shape than the metadata says.
        DiskFull, StoreError: Nothing could be written.
    """
    header = _join_parts([read_gguf_header(path) for path in paths])
    rope_tensor = find_rope_factors(header)
    rope_factors = None if rope_tensor is None else _dequantize(rope_tensor, _read(rope_tensor)).reshape(-1)
    config_json = make_config(header, rope_factors)
    config = parse_config(config_json, None, where=str(header.path))
    sources = _match_tensors(header, config)
    tokenizer = make_tokenizer(header)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise CheckpointError(
            f"{header.path}: {tokenizer.get_vocab_size()} tokens, but embeddings for {config.vocab_size}; pull it again"
        )
    with disk_errors(out_folder):
        out_folder.mkdir(parents=True, exist_ok=True)
        _write_weights(out_folder, config, sources, progress)
        _write_json(out_folder / "config.json", config_json)
        _write_json(out_folder / "generation_config.json", make_generation_config(header))
        (out_folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        _write_json(out_folder / "tokenizer_config.json", make_tokenizer_config(header, config))


def _join_parts(parts: list[GGUFHeader]) -> GGUFHeader:
    """One header for all parts of a split file: metadata of the first, tensors of all."""
    if not parts:
        raise CheckpointError("no GGUF file was given; name one, or all parts of a split one")
    parts = sorted(parts, key=_part_number)
    first = parts[0]
    num_parts = first.metadata.get("split.count", 1) or 1
    numbers = [_part_number(part) for part in parts]
    if numbers != list(range(len(parts))) or num_parts != len(parts):
        raise CheckpointError(
            f"{first.path}: the model is split into {num_parts} files, but parts {numbers} were given; give each once"
        )
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.path}: tensor {name!r} is in {tensors[name].path.name} too; pull it again"
                )
            tensors[name] = tensor
    num_tensors = first.metadata.get("split.tensors.count", len(tensors))
    if num_tensors != len(tensors):
        raise CheckpointError(
            f"{first.path}: {len(tensors)} tensors in all parts, expected {num_tensors}; pull it again"
        )
    return GGUFHeader(path=first.path, metadata=first.metadata, tensors=tensors)


def _part_number(part: GGUFHeader) -> int:
    number = part.metadata.get("split.no", 0)
    if not isinstance(number, int):
        raise HeaderError(f"{part.path}: split.no is {number!r}, expected a number; the file is damaged, pull it again")
    return number


def _match_tensors(header: GGUFHeader, config: ModelConfig) -> dict[str, GGUFTensor]:
    """Source of every tensor of the checkpoint, by its name there; shapes agree and none is left over."""
    sources: dict[str, GGUFTensor] = {}
    for name, shape in tensor_shapes(config).items():
        source_name = _source_name(name, config)
        source = header.tensors.get(source_name)
        if source is None:
            raise CheckpointError(f"{header.path}: tensor {source_name!r} is missing; pull the model again")
        if source.shape != shape:
            raise CheckpointError(
                f"{source.path}: tensor {source_name!r} has shape {list(source.shape)}, "
                f"but the metadata makes it {list(shape)}; the file is damaged, pull it again"
            )
        if len(shape) == 1 and GGML_QUANT_SIZES[source.quantization][0] > 1:
            raise UnsupportedModel(f"{source.path}: vector {source_name!r} is quantised, which no known model does")
        sources[name] = source
    unexpected = header.tensors.keys() - {source.name for source in sources.values()} - {"rope_freqs.weight"}
    if unexpected:
        raise UnsupportedModel(f"{header.path}: a {config.model_type} model has no tensor {min(unexpected)!r}")
    return sources


def _source_name(name: str, config: ModelConfig) -> str:
    stem, kind = name.rsplit(".", 1)
    names = _GEMMA_NAMES if config.model_type == "gemma3_text" else _NAMES
    if not stem.startswith("model.layers."):
        return f"{names[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{names[part]}.{kind}"


def _write_weights(
    folder: Path, config: ModelConfig, sources: dict[str, GGUFTensor], progress: Progress | None
) -> None:
    counted = _Counter(sum(_bf16_bytes(source) for source in sources.values()), progress)
    shards = _split_shards(sources)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = [_convert(name, sources[name], config, counted) for name in names]
        write_safetensors(folder / file_name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": counted.total}, "weight_map": weight_map})


class _Counter:
    """Passes chunks on and reports how many bytes went by."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self._done = 0
        self._progress = progress

    def count(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            yield chunk
            self._done += len(chunk)
            if self._progress is not None:
                self._progress(self._done, self.total)


def _bf16_bytes(source: GGUFTensor) -> int:
    return int(np.prod(source.shape, dtype=np.int64)) * _BF16_BYTES


def _split_shards(sources: dict[str, GGUFTensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, source in sources.items():
        if shards[-1] and shard_bytes + _bf16_bytes(source) > MAX_SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += _bf16_bytes(source)
    return shards


def _convert(name: str, source: GGUFTensor, config: ModelConfig, counted: _Counter) -> TensorToWrite:
    offset = -1.0 if config.model_type == "gemma3_text" and name.endswith("norm.weight") else 0.0
    num_heads = 0
    if config.model_type == "llama" and ".q_proj." in name:
        num_heads = config.num_attention_heads
    elif config.model_type == "llama" and ".k_proj." in name:
        num_heads = config.num_key_value_heads
    return name, "BF16", source.shape, counted.count(_bf16_chunks(source, offset, num_heads))


def _bf16_chunks(source: GGUFTensor, offset: float, num_interleaved_heads: int) -> Iterator[bytes]:
    """The tensor in bf16, a slab of rows at a time."""
    raw = _read(source)
    if num_interleaved_heads:
        rows = raw.reshape(source.shape[0], -1)
        # llama.cpp pairs element i of a head with i + head_dim / 2; whole rows move, so quantised ones can.
        raw = rows.reshape(num_interleaved_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(raw.shape)
    rows_per_slab = max(1, _SLAB_ELEMENTS // source.shape[-1])
    for start in range(0, len(raw), rows_per_slab):
        values = _dequantize(source, raw[start : start + rows_per_slab])
        yield _round_to_bf16(values + np.float32(offset) if offset else values).tobytes()


def _read(source: GGUFTensor) -> np.ndarray:
    """Bytes of the tensor as stored, `[rows, row bytes]`; a vector is one row."""
    with open(source.path, "rb") as file:
        raw = np.fromfile(file, np.uint8, source.num_bytes, offset=source.offset)
    if raw.size < source.num_bytes:
        raise TruncatedFile(f"{source.path}: the file shrank while {source.name!r} was read; pull it again")
    block_size, block_bytes = GGML_QUANT_SIZES[source.quantization]
    return raw.reshape(-1, source.shape[-1] // block_size * block_bytes)


def _dequantize(source: GGUFTensor, raw: np.ndarray) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # a block's scale may be infinite or no number; so are its weights then
            return dequantize(raw, source.quantization).astype(np.float32, copy=False)
    except NotImplementedError as error:
        raise UnsupportedModel(
            f"{source.path}: tensor {source.name!r} is quantised as {source.quantization.name}, which cannot be read; "
            "take a file of another quantisation"
        ) from error


def _round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to the nearest bf16, ties to even, as its 16 bits; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
