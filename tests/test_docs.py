"""What the documents name exists: modules and names, commands and flags, files. What the kernels' pages show runs."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import flashtensors
from flashtensors import config

_ROOT = Path(__file__).parent.parent
_DOCUMENTS = [path for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))) if path.exists()]
_PROGRAMS = [_ROOT / "docs" / name for name in ("attention.md", "kernels.md")]
"""Documents whose Python blocks are one program, from top to bottom."""

_DOTTED = re.compile(r"\bflashtensors(?:\.[A-Za-z_]\w*)+")
_PATH = re.compile(r"(?<![\w/.:-])\.?/?((?:flashtensors|tests|docs|scripts|benchmarks|examples|\.ci)/[\w./*<>-]*)")
_COMMAND = re.compile(r"(?:^|\$ |`)flash ((?!start_)[a-z][\w-]*)([^`\n|]*)", re.MULTILINE)
_FLAG = re.compile(r"(?<!\S)(--?[a-z][\w-]*)")
_VARIABLE = re.compile(r"\bFLASH_[A-Z][A-Z_]*[A-Z]\b")


def code_of(text: str) -> str:
    """The fenced blocks and the backticked spans of a document."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join([*blocks, *(f"`{span}`" for span in spans)])


def program_of(text: str) -> str:
    """The Python blocks of a document, each on the lines where it stands there."""
    lines, language = [], None
    for line in text.splitlines():
        is_fence = line.startswith("```")
        lines.append(line if language == "python" and not is_fence else "")
        if is_fence:
            language = line[3:] if language is None else None
    return "\n".join(lines)


def run_program(path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user does, without Triton's interpreter; tracebacks name lines of the document."""
    path.write_text(program, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", path], capture_output=True, text=True, timeout=280, check=False,
        env=environment, cwd=_ROOT,
    )  # fmt: skip


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or reached from one by attributes."""
    parts = dotted.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            fields = getattr(found, "__struct_fields__", ()) or getattr(found, "__dataclass_fields__", ())
            if part in fields:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def path_exists(pattern: str) -> bool:
    """Whether a path, with `*` or `<name>` for any name, is in the project."""
    pattern = re.sub(r"<[\w-]+>", "*", pattern).rstrip("/.")
    return any(_ROOT.glob(pattern))


def find_command(name: str) -> click.Command | None:
    """The `flash` command of that name."""
    main = importlib.import_module("flashtensors.cli.main")
    groups = [value for value in vars(main).values() if isinstance(value, click.Group)]
    assert groups, "flashtensors.cli.main holds no click group"
    return groups[0].get_command(click.Context(groups[0]), name)


def flags_of(command: click.Command) -> set[str]:
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags | {"--help"}


if not _DOCUMENTS:
    pytest.skip("the project has no documents yet", allow_module_level=True)


@pytest.fixture(params=_DOCUMENTS, ids=lambda path: path.name)
def text(request: pytest.FixtureRequest) -> str:
    return request.param.read_text(encoding="utf-8")


def test_names_exist(text: str) -> None:
    assert [name for name in set(_DOTTED.findall(text)) if not resolves(name)] == []


def test_files_exist(text: str) -> None:
    assert [path for path in set(_PATH.findall(text)) if not path_exists(path)] == []


def test_commands_and_flags_exist(text: str) -> None:
    missing = []
    for name, rest in _COMMAND.findall(code_of(text)):
        command = find_command(name)
        if command is None:
            missing.append(f"flash {name}")
            continue
        rest = re.sub(r"\"[^\"]*\"|'[^']*'|#.*", "", rest)
        missing += [f"flash {name} {flag}" for flag in _FLAG.findall(rest) if flag not in flags_of(command)]
    assert missing == []


def test_environment_variables_exist(text: str) -> None:
    known = {config.ENV_PREFIX + name.upper() for name in config.Settings.__struct_fields__}
    assert set(_VARIABLE.findall(text)) <= known


def test_links_lead_somewhere(text: str, request: pytest.FixtureRequest) -> None:
    document = request.node.callspec.params["text"]
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in links if not (document.parent / link.split("#")[0]).exists()] == []


@pytest.mark.parametrize("document", _PROGRAMS, ids=lambda path: path.name)
def test_examples_run(document: Path, tmp_path: Path) -> None:
    program = program_of(document.read_text(encoding="utf-8"))
    assert program.strip(), "the document has no examples"
    finished = run_program(tmp_path / f"{document.stem}.py", program)
    assert finished.returncode == 0, finished.stderr


def test_examples_that_fail_are_seen(tmp_path: Path) -> None:
    program = program_of("text\n```sh\nexit 0\n```\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    finished = run_program(tmp_path / "wrong.py", program)
    assert finished.returncode == 1
    assert "line 10" in finished.stderr


def test_checks_can_fail() -> None:
    assert resolves("flashtensors.errors.FlashError.code")
    assert resolves("flashtensors.config.Settings.server_port")
    assert not resolves("flashtensors.errors.NoSuchError")
    assert not resolves("flashtensors.no_such_room.thing")
    assert path_exists("flashtensors/<room>/__init__.py")
    assert not path_exists("docs/no-such-page.md")
    assert _COMMAND.findall(code_of("text `flash run --keep-alive 5m x`")) == [("run", " --keep-alive 5m x")]
    assert {module.name for module in pkgutil.iter_modules(flashtensors.__path__)} >= {"errors", "config"}
