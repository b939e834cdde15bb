"""A made-up tokeniser for models of random weights, so that benchmarks may go through text.

The first 10,000 tokens after two special ones are words of two syllables, each of which any text has as one token; so
the ids of `workloads` are texts, too. All ids have text.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>")
_SYLLABLES = ["".join(pair) for pair in itertools.product("bcdfghjklmnpqrstvwxz", "aeiou")]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write byte-level BPE, as most models have; what is left of the vocabulary is words that no merge makes.

    Its first tokens are those that begin and end a text in `benchmarks.transfer.checkpoints`.
    """
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
