"""The `tokenizer.json` and `tokenizer_config.json` of a model that came as GGUF.

Two kinds exist. `gpt2` is byte-level BPE: the file lists the merges, and names the rule that cuts text into words
before merging (`tokenizer.ggml.pre`; the rules are those of llama.cpp's `src/llama-vocab.cpp`). `llama` is
SentencePiece BPE: no words, and a pair merges in the order of the score of what it becomes, so merges follow from
vocabulary and scores.
"""

from __future__ import annotations

from typing import NoReturn, TypeVar

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError, HeaderError, UnsupportedModel
from .architecture import ModelConfig
from .gguf_header import GGUFHeader

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
_Item = TypeVar("_Item")

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_NAMES = frozenset({"llama3", "llama-v3", "llama-bpe"})
_QWEN2_NAMES = frozenset({"qwen2", "deepseek-r1-qwen"})
_DIGITS_NAMES = frozenset({"smollm"})
_GPT2_NAMES = frozenset({"default", "gpt-2"})


def make_tokenizer(header: GGUFHeader) -> Tokenizer:
    """The tokenizer that `header` describes, ready to be written as `tokenizer.json`.

    Control tokens in a text are read as what they are, as Hugging Face tokenizers do.

    Raises:
        UnsupportedModel: A kind of tokenizer, or a rule for words, that is not known.
        CheckpointError: The metadata has no tokenizer, or its parts contradict each other.
    """
    vocabulary = _Vocabulary(header)
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(vocabulary)
    elif kind == "llama":
        tokenizer = _sentencepiece(vocabulary)
    else:
        raise UnsupportedModel(f"{header.path}: tokenizer {kind!r} is not supported; gpt2 and llama are")
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in vocabulary.of_type(_CONTROL, _UNKNOWN)]
    )
    # SentencePiece looks for user-defined tokens in the text whose spaces are already replaced. With a space prefix
    # that cannot be said here, as the tokens would get it too; they are then looked for first, as llama.cpp does.
    is_normalized = kind == "llama" and not vocabulary.adds_space_prefix
    tokenizer.add_tokens(
        [AddedToken(token, normalized=is_normalized, special=False) for token in vocabulary.of_type(_USER_DEFINED)]
    )
    _add_edges(tokenizer, vocabulary)
    return tokenizer


def make_tokenizer_config(header: GGUFHeader, config: ModelConfig) -> dict[str, object]:
    """`tokenizer_config.json`: special tokens by name, what is added to a text, and the chat template."""
    vocabulary = _Vocabulary(header)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {key: vocabulary.find_special(name) for key, name in names.items()}
    template = header.metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.adds("bos"),
        "add_eos_token": vocabulary.adds("eos"),
        **{key: token for key, token in found.items() if token is not None},
        **({"chat_template": template} if isinstance(template, str) else {}),
    }


class _Vocabulary:
    """Tokens and their types, checked against each other."""

    def __init__(self, header: GGUFHeader) -> None:
        self._header = header
        self.is_sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
        self.pre_tokenizer = str(header.metadata.get("tokenizer.ggml.pre", "default"))
        tokens = self.read_list("tokens", str)
        if not tokens:
            raise CheckpointError(f"{header.path}: the file has no tokenizer; take one with tokenizer.ggml.tokens")
        self._types = self.read_list("token_type", int) or [_NORMAL] * len(tokens)
        if len(self._types) != len(tokens):
            self.fail(f"{len(tokens)} tokens, but {len(self._types)} token types")
        if self.is_sentencepiece:
            # llama.cpp's converter spells user-defined tokens with spaces, and normal ones with their replacement.
            pairs = zip(tokens, self._types, strict=True)
            tokens = [token.replace(" ", _SPACE) if kind == _USER_DEFINED else token for token, kind in pairs]
        self.tokens = tokens
        self.ids = {token: token_id for token_id, token in reversed(list(enumerate(tokens)))}

    def read_list(self, key: str, item_type: type[_Item]) -> list[_Item]:
        """The array `tokenizer.ggml.<key>`; empty when absent."""
        value = self._header.metadata.get(f"tokenizer.ggml.{key}", [])
        if not isinstance(value, list) or not all(isinstance(item, item_type) for item in value):
            self.fail(f"tokenizer.ggml.{key} is not a list of {item_type.__name__}")
        return [item for item in value if isinstance(item, item_type)]

    def of_type(self, *types: int) -> list[str]:
        """Tokens of some types, in the order of their ids."""
        return [token for token, kind in zip(self.tokens, self._types, strict=True) if kind in types]

    def find_special(self, name: str) -> str | None:
        """The token that the metadata names as `bos`, `eos`, `unknown` or `padding`."""
        token_id = self._header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is None:
            return None
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            self.fail(f"tokenizer.ggml.{name}_token_id is {token_id!r}, expected an id below {len(self.tokens)}")
        return self.tokens[token_id]

    def adds(self, name: str) -> bool:
        """Whether `bos` or `eos` is added to a text; llama.cpp's defaults where the file does not say."""
        default = name == "bos" and (self.is_sentencepiece or self.pre_tokenizer in _LLAMA3_NAMES)
        return bool(self._header.metadata.get(f"tokenizer.ggml.add_{name}_token", default))

    @property
    def adds_space_prefix(self) -> bool:
        """Whether a text is read as if it began with a space (SentencePiece alone)."""
        return bool(self._header.metadata.get("tokenizer.ggml.add_space_prefix", True))

    def fail(self, problem: str) -> NoReturn:
        """Raise `HeaderError` about the tokenizer."""
        raise HeaderError(f"{self._header.path}: tokenizer: {problem}; the file is damaged, pull it again")

    def refuse_pre_tokenizer(self) -> NoReturn:
        """Raise for a rule that is not known."""
        known = sorted(_LLAMA3_NAMES | _QWEN2_NAMES | _DIGITS_NAMES | _GPT2_NAMES)
        raise UnsupportedModel(
            f"{self._header.path}: tokenizer.ggml.pre {self.pre_tokenizer!r} is not supported; {', '.join(known)} are"
        )


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    merges: list[tuple[str, str]] = []
    for merge in vocabulary.read_list("merges", str):
        left, _, right = merge.partition(" ")
        if left not in vocabulary.ids or right not in vocabulary.ids or left + right not in vocabulary.ids:
            vocabulary.fail(f"merge {merge!r} names what is no token")
        merges.append((left, right))
    is_llama3 = vocabulary.pre_tokenizer in _LLAMA3_NAMES
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=is_llama3))
    if vocabulary.pre_tokenizer in _QWEN2_NAMES:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_word_rules(vocabulary))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_rules(vocabulary: _Vocabulary) -> list[pre_tokenizers.PreTokenizer]:
    """How text is cut into words. `default` is GPT-2's rule."""
    name = vocabulary.pre_tokenizer
    if name in _LLAMA3_NAMES | _QWEN2_NAMES:
        split = Regex(_LLAMA3_SPLIT if name in _LLAMA3_NAMES else _QWEN2_SPLIT)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return [pre_tokenizers.Split(split, behavior="isolated"), byte_level]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS_NAMES:
        return [pre_tokenizers.Digits(individual_digits=True), byte_level]
    if name in _GPT2_NAMES:
        return [byte_level]
    vocabulary.refuse_pre_tokenizer()


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    unknown = vocabulary.find_special("unknown") or next(iter(vocabulary.of_type(_UNKNOWN)), None)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_from_scores(vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace: normalizers.Normalizer = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.adds_space_prefix:
        replace = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a normal token of two, best score first.

    Tokens of other types take no part: SentencePiece finds user-defined ones before it merges and never makes the
    rest.
    """
    scores = vocabulary.read_list("scores", float)
    if len(scores) != len(vocabulary.tokens):
        vocabulary.fail(f"{len(vocabulary.tokens)} tokens, but {len(scores)} scores")
    ids = vocabulary.ids
    normal = set(vocabulary.of_type(_NORMAL))
    merges: list[tuple[str, str]] = []
    for token in sorted(normal, key=lambda token: (-scores[ids[token]], ids[token])):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _add_edges(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Make `tokenizer` add the beginning and end of text, where the file wants them."""
    first = vocabulary.find_special("bos") if vocabulary.adds("bos") else None
    last = vocabulary.find_special("eos") if vocabulary.adds("eos") else None
    added = [token for token in (first, last) if token is not None]
    if not added:
        return
    template = [token for token in (first, "$A", last) if token is not None]
    special_tokens = [(token, vocabulary.ids[token]) for token in dict.fromkeys(added)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
