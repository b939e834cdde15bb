"""Texts that tell tokenizers apart."""

import random

_PIECES = [
    *("hello", " world", "The quick brown fox", "CamelCaseWord", "snake_case_word", "don't", "I'LL", "we've", "'S"),
    *(" ", "  ", "   ", " " * 31, " " * 40, "\t", "\t" * 20, "\n", "\n\n", "\n" * 35, "\r\n", "\u00a0", "\u200b"),
    *("    def f(x):\n        return x+1\n", "for(i=0;i<10;i++)", '{"a": [1, 2]}', "http://x.y/z?q=1&r=2", "&amp;"),
    *("123", "4567890", "3.14", "0x1F", "1e-5", "$100", "50%", "½", "²", "٣", "!!!", "...", "--", "@user", "#tag"),
    *("ñandú", "Ünïcödé", "e\u0301", "ﬁ", "ß", "İ", "ı", "ǆ", "𝔘𝔫𝔦", "日本語のテキスト", "中文分词", "한국어"),
    *("русский текст", "العربية", "हिन्दी", "ไทย", "ᏣᎳᎩ", "👩‍👩‍👧‍👦", "🏳️‍🌈", "\x7f", "\ud7ff", "\uffff", "\U0010ffff"),
    *("<table>", "</h1>", "<think>", "<|im_end", "▁", "▁▁", "a" * 30),
]
_RANGES = [(32, 126), (0xA0, 0x24F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF)]


def varied_texts(count: int, *, more_pieces: tuple[str, ...] = (), seed: int = 0) -> list[str]:
    """Texts of prose, code, digits, white space and many scripts; the same for the same seed."""
    choose = random.Random(seed)
    pieces = [*_PIECES, *more_pieces]
    texts = ["", *pieces]
    while len(texts) < count:
        if len(texts) % 4:
            texts.append("".join(choose.choices(pieces, k=choose.randint(1, 8))))
        else:
            characters = (choose.randint(*choose.choice(_RANGES)) for _ in range(choose.randint(1, 40)))
            texts.append("".join(map(chr, characters)))
    return texts
