"""Checkpoints of published shapes with random weights and a made-up tokeniser, for benchmarks of the whole system.

The first 10,000 tokens after two special ones are words of two syllables, each of which any text has as one token; so
the ids of `workloads` are texts, too. All ids have text.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[2]))

from flashtensors.checkpoint.architecture import ModelConfig, read_model_config
from flashtensors.checkpoint.safetensors import SINGLE_FILE, write_safetensors
from flashtensors.checkpoint.tensor_names import tensor_shapes

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>")
_SYLLABLES = ["".join(pair) for pair in itertools.product("bcdfghjklmnpqrstvwxz", "aeiou")]


def write_checkpoint(folder: Path, config: ModelConfig, device: torch.device) -> Path:
    """Write a model of this shape in bfloat16, its weights drawn on `device`, and its tokeniser; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    eos_token_id = _SPECIAL_TOKENS.index("<|im_end|>")
    raw = {key: value for key, value in msgspec.to_builtins(config).items() if value not in (None, [])}
    raw |= {"eos_token_id": eos_token_id, "bos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    read = read_model_config(folder)
    assert read == msgspec.structs.replace(config, bos_token_id=0, eos_token_ids=(eos_token_id,)), read
    write_safetensors(folder / SINGLE_FILE, _tensors(config, device), {"format": "pt"})
    _write_tokenizer(folder, config.vocab_size)
    return folder


def _tensors(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[bytes]]]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Iterator[bytes]:
        tensor = torch.ones(shape, device=device)
        if len(shape) > 1:
            tensor.normal_(0, 0.02, generator=generator)
        yield tensor.bfloat16().view(torch.uint8).cpu().numpy().tobytes()

    for name, shape in tensor_shapes(config).items():
        yield name, "BF16", shape, draw(shape)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE, as most models have; what is left of the vocabulary is words that no merge makes."""
    words = ["".join(pair) for pair in itertools.product(_SYLLABLES, repeat=2)]
    tokens = [*_SPECIAL_TOKENS, *(f"Ġ{word}" for word in words), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [*_SYLLABLES, *words]
    assert len(tokens) <= vocab_size, f"a vocabulary of {vocab_size} does not hold {len(tokens)} tokens"
    tokens += [f"Ġw{number}" for number in range(vocab_size - len(tokens))]
    merges = [(syllable[0], syllable[1]) for syllable in _SYLLABLES]
    merges += [*itertools.product(_SYLLABLES, repeat=2), *(("Ġ", word) for word in words)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")
