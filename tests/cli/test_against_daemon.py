"""The commands with a daemon process and a tiny random model behind them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flashtensors.cli.main import run_command_line
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer

BRIEF = ["--max-tokens", "6", "--temperature", "0"]


@pytest.fixture(scope="module", autouse=True)
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model on disk, and an empty store whose daemon `flash run` will start."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    write_tiny_checkpoint(folder, tiny_config("llama"))
    write_tiny_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASH_STORAGE_PATH", str(folder.parent / "store"))
        patch.setenv("FLASH_SERVER_PORT", "0")
        patch.setenv("FLASH_DEVICE", "cpu")
        patch.setenv("FLASH_KV_CACHE_SIZE", "4MiB")
        yield folder
        run_command_line(["stop"])


def flash(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flashtensors.cli.main", *arguments]
    stdin = {"input": text} if text is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=os.environ, **stdin)


def test_the_life_of_a_model(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the pull without a daemon to the removal: each command in the order in which people meet them."""

    def shown(*arguments: str, code: int = 0) -> str:
        assert run_command_line(list(arguments)) == code
        return capsys.readouterr().out

    assert shown("pull", str(model_folder)) == "pulled tiny\n"
    assert "tiny" in shown("list")
    assert shown("verify", "tiny").startswith("ok")
    answer = flash("run", "tiny", "hello", *BRIEF)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.strip()
    piped = flash("run", "tiny", *BRIEF, text="hello")
    assert piped.stdout == answer.stdout
    whole = msgspec.json.decode(shown("run", "tiny", "hello", *BRIEF, "--json"))
    assert whole["response"] == answer.stdout.removesuffix("\n")
    assert whole["eval_count"] == 6
    verbose = flash("run", "tiny", "hello", *BRIEF, "--verbose")
    assert verbose.stdout == answer.stdout
    assert "answer: 6 tokens" in verbose.stderr
    assert "tiny" in shown("ps")
    status = msgspec.json.decode(shown("status", "--json"))
    assert status["is_running"]
    assert status["worker"]["state"] == "ready"
    assert "unloaded tiny" in shown("unload", "tiny")
    assert msgspec.json.decode(shown("ps", "--json"))["models"] == []
    assert shown("load", "tiny", "--pin").startswith("loaded tiny")
    assert "pinned" in shown("ps")
    assert msgspec.json.decode(shown("show", "tiny", "--json"))["name"] == "tiny"
    assert "removed tiny" in shown("rm", "tiny")
    assert msgspec.json.decode(shown("list", "--json")) == []
    assert (model_folder / "config.json").exists()
    assert shown("pull", str(model_folder)) == "pulled tiny\n"  # now through the daemon
    assert shown("pull", str(model_folder), "--name", "mine") == "pulled mine\n"
    assert "daemon stopped" in shown("stop")
    assert shown("pull", str(model_folder), "--name", "own") == "pulled own\n"
    assert [record["name"] for record in msgspec.json.decode(shown("list", "--json"))] == ["mine", "own", "tiny"]


def test_a_model_that_nobody_has_is_an_error_in_one_line() -> None:
    result = flash("run", "nonesuch", "hello")
    assert result.returncode == 4
    assert result.stderr.startswith("error: no model 'nonesuch'")
    assert result.stdout == ""


def test_a_chat_goes_on_until_bye(model_folder: Path) -> None:
    run_command_line(["pull", str(model_folder)])
    program = (
        "import sys; sys.stdin.isatty = lambda: True; "
        "from flashtensors.cli.main import run_command_line; sys.exit(run_command_line(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "run", "tiny", "--system", "be kind", *BRIEF, "--verbose"]
    lines = "hello\n\nand again\n/bye\nnever asked\n"
    result = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("answer: 6 tokens") == 2
    counts = [line.split()[1] for line in result.stderr.splitlines() if line.startswith("prompt:")]
    assert int(counts[1]) > int(counts[0]), "the second question carries the first and its answer"
