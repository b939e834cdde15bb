"""The command line without a daemon: help, errors, exit codes, flags, and what it imports."""

import shlex
import subprocess
import sys
from pathlib import Path

import click
import msgspec
import pytest

from flashtensors.cli.main import _COMMANDS, run_command_line
from flashtensors.cli.output import size_text
from flashtensors.cli.settings_options import field_docstrings, settings_options
from flashtensors.config import Settings
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer


@pytest.fixture(autouse=True)
def _own_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASH_STORAGE_PATH", str(store))
    monkeypatch.setenv("FLASH_SERVER_PORT", "0")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in _COMMANDS:
        assert f"\n  {name} " in shown


@pytest.mark.parametrize("name", [*_COMMANDS, "ls"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line([name, "--help"]) == 0
    assert "Usage: flash" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["pull", "--help"], ["status"]])
def test_commands_import_neither_torch_nor_a_web_server(arguments: list[str]) -> None:
    program = (
        "import sys; from flashtensors.cli.main import run_command_line; "
        f"run_command_line({arguments!r}); "
        "print([name for name in ('torch', 'transformers', 'starlette', 'uvicorn', 'rich') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_every_setting_is_a_flag_of_start_with_its_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = field_docstrings()
    assert set(texts) == set(Settings.__struct_fields__)
    run_command_line(["start", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in set(Settings.__struct_fields__) - {"storage_path"}:
        assert "--" + name.replace("_", "-") in shown
        assert " ".join(texts[name].split()[:3]) in shown


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--eager"], True), (["--enforce-eager"], True), (["--no-eager"], False), ([], None)],
)
def test_eager_is_a_second_name_of_enforce_eager(flags: list[str], expected: bool | None) -> None:
    command = click.command()(settings_options(lambda **given: given))
    given = command.main(flags, standalone_mode=False)
    assert given["enforce_eager"] is expected
    assert "eager" not in given


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["dance"], 2, "No such command"),
        (["show"], 2, "Missing argument"),
        (["show", "nothing"], 4, "error: no model 'nothing'"),
        (["show", "smolm2:135m"], 4, "did you mean smollm2:135m?"),
        (["pull", "smolm2:135m"], 1, "did you mean smollm2:135m?"),
        (["pull", ""], 2, "the reference is empty"),
        (["run", "x", "caf\udce9"], 2, "the prompt is not text in UTF-8"),
        (["run", "x", "tea", "--system", "\udce9"], 2, "the prompt is not text in UTF-8"),
        (["pull", "x/y", "--name", "no name"], 1, "error: 'no name' is not a model name"),
        (["rm", "nothing"], 4, "error: no model 'nothing'"),
        (["show", "../../etc/passwd"], 1, "error: '../../etc/passwd' is not a model name"),
        (["verify", "nothing"], 4, "error: no model"),
        (["ps"], 3, "error: no daemon runs"),
        (["unload", "x"], 3, "error: no daemon runs"),
        (["unload"], 2, "name the models"),
        (["start", "--gpu-memory-utilization", "3"], 1, "error: gpu_memory_utilization is 3.0"),
        (["start", "--server-host", "0.0.0.0"], 1, "error: server_host 0.0.0.0 is reachable"),
        (["stop"], 0, "no daemon runs"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(arguments) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["--debug", "show", "nothing"]) == 4
    assert "Traceback" in capsys.readouterr().err


def test_status_says_in_json_that_nothing_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["status", "--json"]) == 3
    assert msgspec.json.decode(capsys.readouterr().out) == {"is_running": False}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["completion", shell]) == 0
    assert "_FLASH_COMPLETE" in capsys.readouterr().out


def test_doctor_reports_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command_line(["doctor", "--json"])
    findings = {finding["check"]: finding["status"] for finding in msgspec.json.decode(capsys.readouterr().out)}
    assert {"python", "torch", "gpu", "store", "daemon", "hub cache"} <= set(findings)
    assert code == (1 if "error" in findings.values() else 0)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (93_100_000, "93.1 MB"), (5 * 10**12, "5.0 TB")],
)
def test_sizes_for_people(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text


def test_a_changed_model_is_an_error_that_says_how_to_pull_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a model"
    write_tiny_checkpoint(folder, tiny_config("llama"))
    write_tiny_tokenizer(folder)
    assert run_command_line(["pull", str(folder), "--name", "mine"]) == 0
    with (folder / "generation_config.json").open("a") as file:
        file.write(" ")
    capsys.readouterr()
    assert run_command_line(["verify", "mine"]) == 1
    error = capsys.readouterr().err
    assert "1 of 5 files of mine are not what was pulled" in error
    command = shlex.split(error.strip().rpartition("; ")[2])
    assert run_command_line(command[1:]) == 0
    assert run_command_line(["verify", "mine"]) == 0


def test_a_quantised_copy_is_pulled_shown_and_pulled_again(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_tokenizer(write_tiny_checkpoint(tmp_path / "tiny", tiny_config("qwen3")))
    assert run_command_line(["pull", str(folder), "--quantize", "fp8"]) == 0
    assert capsys.readouterr().out == "pulled tiny:fp8\n"
    assert run_command_line(["show", "tiny:fp8"]) == 0
    assert "quantization  fp8\n" in capsys.readouterr().out
    next(store.glob("models/*/*/config.json")).write_text("{}")
    assert run_command_line(["verify", "tiny:fp8"]) == 1
    command = shlex.split(capsys.readouterr().err.strip().rpartition("; ")[2])
    assert run_command_line(command[1:]) == 0
    assert run_command_line(["verify", "tiny:fp8"]) == 0
