"""Small tokenizers of both families, trained here, in the files that a model brings."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flashtensors.text import tokenizer as text

_CORPUS = [
    "the quick brown fox jumps over the lazy dog, then it stops. Stop stop stopping the STOP!",
    "def main():\n    return {'a': 1, 'b': [2, 3]}\n",
    "Grüße aus Köln, où ça coûte 3 € — 你好,世界。 Привет мир 🙂🙂",
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_byte_level(folder: Path) -> Path:
    """A GPT-2-like tokenizer: special tokens, one added token that is not special, a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<a tool>", normalized=False)])
    return _write(folder, tokenizer, {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE})


def write_sentencepiece(folder: Path, *, strips_first_space: bool = True) -> Path:
    """A Llama-2-like tokenizer: `▁` for space, bytes for what the vocabulary lacks, a BOS before each text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=120, limit_alphabet=40, show_progress=False)
    trained.train_from_iterator([line.replace(" ", "▁") for line in _CORPUS], trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in learned["vocab"] if token not in tokens]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("▁")] if strips_first_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if strips_first_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> text.Tokenizer:
    return text.Tokenizer.from_folder(byte_level_folder)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_folder: Path) -> text.Tokenizer:
    return text.Tokenizer.from_folder(sentencepiece_folder)


@pytest.fixture(scope="session")
def gemma_like(tmp_path_factory: pytest.TempPathFactory) -> text.Tokenizer:
    """Keeps the first space, as Gemma does."""
    folder = write_sentencepiece(tmp_path_factory.mktemp("gemma"), strips_first_space=False)
    return text.Tokenizer.from_folder(folder)
