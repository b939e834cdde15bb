"""Settings: where each value comes from, and what a wrong one says."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtensors.config import Settings, load_settings, parse_keep_alive, parse_size, settings_from
from flashtensors.errors import ConfigError


def write_config(store: Path, text: str) -> dict[str, str]:
    """Write the store's config file; returns an environment that names the store."""
    (store / "config.toml").write_text(text)
    return {"FLASH_STORAGE_PATH": str(store)}


def test_keyword_then_environment_then_file_then_default(store: Path) -> None:
    environ = write_config(store, "server_port = 1\nnum_threads = 2\nmax_queue = 3\n")
    environ |= {"FLASH_SERVER_PORT": "10", "FLASH_NUM_THREADS": "20"}
    settings = load_settings({"server_port": 100}, environ=environ)
    assert (settings.server_port, settings.num_threads, settings.max_queue) == (100, 20, 3)
    assert settings.max_num_seqs == Settings().max_num_seqs


def test_keyword_that_is_none_is_as_if_absent(store: Path) -> None:
    environ = write_config(store, "num_threads = 2")
    assert load_settings({"num_threads": None}, environ=environ).num_threads == 2


def test_store_of_a_keyword_is_where_the_file_is_read(store: Path, tmp_path: Path) -> None:
    write_config(store, "num_threads = 2")
    elsewhere = {"FLASH_STORAGE_PATH": str(tmp_path)}
    settings = load_settings({"storage_path": str(store)}, environ=elsewhere)
    assert (settings.num_threads, settings.store) == (2, store)


def test_process_environment_is_read_unless_another_is_given(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_STORAGE_PATH", str(store))
    monkeypatch.setenv("FLASH_MAX_QUEUE", "7")
    assert load_settings().max_queue == 7
    assert load_settings(environ={"FLASH_STORAGE_PATH": str(store)}).max_queue == Settings().max_queue


def test_variables_of_others_are_left_alone(store: Path) -> None:
    environ = {"FLASH_STORAGE_PATH": str(store), "FLASH_ATTENTION_FORCE_BUILD": "1", "PATH": "/bin"}
    assert load_settings(environ=environ) == Settings(storage_path=str(store))


def test_home_is_expanded() -> None:
    assert Settings(storage_path="~/models").store == Path.home() / "models"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("server_prot", "did you mean 'server_port'"),
        ("mem_pool_sise", "did you mean 'mem_pool_size'"),
        ("zzz", "known"),
    ],
)
def test_unknown_setting_suggests_the_near_one(store: Path, key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as failure:
        settings_from({key: 1})
    assert failure.value.param == key
    with pytest.raises(ConfigError, match=hint):
        load_settings(environ=write_config(store, f"{key} = 1"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("server_port", -1),
        ("server_port", 65536),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.01),
        ("chunk_size", 4095),
        ("num_threads", 0),
        ("max_num_seqs", 0),
        ("max_tokens_per_step", 0),
        ("max_queue", 0),
        ("mem_pool_size", 0),
        ("kv_cache_size", -5),
        ("max_model_len", 0),
        ("kv_cache_dtype", "int4"),
        ("device", "tpu"),
        ("device", "cuda:"),
        ("device", "cuda:0 "),
    ],
)
def test_value_out_of_range_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {re.escape(repr(value))}, but it must be") as failure:
        Settings(**{field: value})  # pyright: ignore[reportArgumentType]
    assert failure.value.param == field


@pytest.mark.parametrize(
    ("field", "value"), [("server_port", "http"), ("num_threads", [1]), ("allow_unauthenticated", "maybe")]
)
def test_value_of_the_wrong_type_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        settings_from({field: value})


def test_value_out_of_range_in_the_environment_names_its_field(store: Path) -> None:
    with pytest.raises(ConfigError, match="num_threads is 0"):
        load_settings(environ={"FLASH_STORAGE_PATH": str(store), "FLASH_NUM_THREADS": "0"})


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("1", True), ("false", False), ("0", False)])
def test_booleans_in_the_environment(store: Path, text: str, expected: bool) -> None:
    environ = {"FLASH_STORAGE_PATH": str(store), "FLASH_ALLOW_UNAUTHENTICATED": text}
    assert load_settings(environ=environ).allow_unauthenticated is expected


def test_sizes_are_understood_from_every_source(store: Path) -> None:
    environ = write_config(store, 'mem_pool_size = "30GiB"\nchunk_size = 65536') | {"FLASH_KV_CACHE_SIZE": "1.5g"}
    settings = load_settings({"chunk_size": "1MiB"}, environ=environ)
    assert (settings.mem_pool_size, settings.kv_cache_size, settings.chunk_size) == (30 * 2**30, 1_500_000_000, 2**20)


@pytest.mark.parametrize("content", [b"server_port = ", b"\xff\xfe", b"[[["])
def test_file_that_is_not_toml_is_named(store: Path, content: bytes) -> None:
    (store / "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml: cannot be read as TOML"):
        load_settings(environ={"FLASH_STORAGE_PATH": str(store)})


def test_file_that_cannot_be_opened_is_named(store: Path) -> None:
    (store / "config.toml").mkdir()
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_settings(environ={"FLASH_STORAGE_PATH": str(store)})


def test_settings_cannot_change() -> None:
    with pytest.raises(AttributeError):
        Settings().server_port = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096b", 4096),
        ("2k", 2000),
        ("2 KiB", 2048),
        ("30GiB", 30 * 2**30),
        ("30gb", 30 * 10**9),
        ("1.5g", 1_500_000_000),
        ("0.5MiB", 2**19),
        (" 1T ", 10**12),
        ("1ti", 2**40),
        (77, 77),
    ],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 2", "1.GiB", "3 apples", "1e9", "0x10", "١٢ apples"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@given(st.integers(0, 2**50), st.sampled_from(["", "k", "M", "g", "T", "Ki", "mi", "Gi", "tI"]), st.booleans())
def test_whole_sizes_are_exact(count: int, unit: str, has_b: bool) -> None:
    base = 1024 if unit.lower().endswith("i") else 1000
    power = " kmgt".index(unit[:1].lower() or " ")
    expected = count * base**power
    parsed = parse_size(f"{count}{unit}{'b' if has_b else ''}")
    assert parsed == pytest.approx(expected, rel=1e-12)
    assert parsed == expected or expected >= 2**53


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 300.0),
        (0, 0.0),
        ("0", 0.0),
        (-1, -1.0),
        ("-1", -1.0),
        (2.5, 2.5),
        ("90", 90.0),
        ("10m", 600.0),
        ("1h30m", 5400.0),
        ("1h30m15.5s", 5415.5),
        ("250ms", 0.25),
        ("-1m", -60.0),
        (" 5s ", 5.0),
        ("0s", 0.0),
    ],
)
def test_keep_alive(value: str | float | None, seconds: float) -> None:
    assert parse_keep_alive(value, 300.0) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "value", ["", "m", "5 m", "5x", "1h 30m", "--5", "+5", "5m!", "1e3", "nan", "inf", True, False]
)
def test_what_is_not_a_keep_alive_is_refused(value: str | bool) -> None:
    with pytest.raises(ConfigError, match="keep_alive is") as failure:
        parse_keep_alive(value, 300.0)
    assert failure.value.param == "keep_alive"


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from(sorted(_UNITS))), min_size=1, max_size=5), st.booleans())
def test_keep_alive_adds_its_parts(parts: list[tuple[int, str]], is_negative: bool) -> None:
    text = ("-" if is_negative else "") + "".join(f"{count}{unit}" for count, unit in parts)
    seconds = sum(count * _UNITS[unit] for count, unit in parts)
    assert parse_keep_alive(text, 0.0) == pytest.approx(-seconds if is_negative else seconds)


@given(st.text(alphabet="0123456789hms.- x", max_size=12))
def test_keep_alive_answers_what_its_grammar_allows_and_refuses_the_rest(text: str) -> None:
    is_allowed = re.fullmatch(r"-?(\d+(\.\d+)?|(\d+(\.\d+)?(ms|s|m|h))+)", text.strip()) is not None
    if is_allowed:
        assert math.isfinite(parse_keep_alive(text, 300.0))
        return
    with pytest.raises(ConfigError, match="keep_alive is"):
        parse_keep_alive(text, 300.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    settings = Settings(server_host=host)
    assert settings.is_loopback
    settings.check_exposure()


def test_open_address_wants_a_key_or_a_clear_word() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is reachable from other machines"):
        Settings(server_host="0.0.0.0").check_exposure()
    Settings(server_host="0.0.0.0", api_key="secret").check_exposure()
    Settings(server_host="0.0.0.0", allow_unauthenticated=True).check_exposure()


def test_a_store_that_is_no_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory; storage_path must be a folder"):
        load_settings({"storage_path": str(tmp_path / "file")}, environ={})


@pytest.mark.parametrize("text", ["num_thread = 3", "num_threads = 0", 'server_port = "x"'])
def test_what_the_file_says_wrong_names_the_file(store: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml: .*(num_thread|server_port)"):
        load_settings(environ=write_config(store, text))
