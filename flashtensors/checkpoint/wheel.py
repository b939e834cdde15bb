"""Wheels as archives from strangers: what is taken out is checked against their RECORD, and nothing else is read.

The wheel format: https://packaging.python.org/en/latest/specifications/binary-distribution-format/.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import email.parser
import hashlib
import io
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import msgspec

from ..errors import DigestMismatch, PullError

_MAX_TEXT_BYTES = 16 * 1024**2
_MAX_EXPANSION = 100  # weights hardly compress; a bomb of zeros reaches 1032
_CHUNK_BYTES = 1024**2
_ALGORITHMS = ("sha256", "sha384", "sha512")
_PIN = re.compile(r"(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*) *\(?== *(?P<version>[A-Za-z0-9][A-Za-z0-9._!+-]*)\)?")


class PinnedRequirement(msgspec.Struct, frozen=True):
    """A dependency on exactly one version."""

    package: str
    version: str


class Wheel:
    """An open wheel whose members passed `open_wheel`'s checks; members are named by their path in the archive."""

    def __init__(self, name: str, archive: zipfile.ZipFile) -> None:
        self.name = name
        self._archive = archive
        self._sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
        dist_info = self._find_dist_info()
        self._digests = self._read_record(f"{dist_info}/RECORD")
        self._metadata = email.parser.Parser().parsestr(self.read_text(f"{dist_info}/METADATA"), headersonly=True)

    @property
    def distribution(self) -> str:
        """The package's name, as it writes it."""
        return self._metadata.get("Name", "")

    @property
    def version(self) -> str:
        """The package's version."""
        return self._metadata.get("Version", "")

    @property
    def pinned_requirements(self) -> list[PinnedRequirement]:
        """Dependencies on exactly one version, without those for extras or platforms."""
        matches = [_PIN.fullmatch(text.strip()) for text in self._metadata.get_all("Requires-Dist", [])]
        return [PinnedRequirement(match["package"], match["version"]) for match in matches if match]

    @property
    def members(self) -> dict[str, int]:
        """Every file and its size once unpacked."""
        return dict(self._sizes)

    def read_text(self, member: str) -> str:
        """A small text file, checked as `copy` does."""
        if self._sizes.get(member, 0) > _MAX_TEXT_BYTES:
            raise self._refuse(f"{member} has {self._sizes[member]} bytes, at most {_MAX_TEXT_BYTES} are read")
        buffer = io.BytesIO()
        self.copy(member, buffer)
        return buffer.getvalue().decode("utf-8", errors="replace")

    def copy(self, member: str, out: BinaryIO, on_chunk: Callable[[bytes], None] | None = None) -> None:
        """Append a member to `out`, in pieces; `on_chunk` sees each.

        Raises:
            DigestMismatch: The bytes are not those that RECORD names; what `out` got is to be thrown away.
            PullError: It is not in the archive or not in RECORD, or its compressed bytes are damaged.
        """
        if member not in self._sizes or member not in self._digests:
            raise self._refuse(f"{member} is not in the archive, or RECORD gives no digest of it")
        algorithm, expected = self._digests[member]
        digest = hashlib.new(algorithm)
        for chunk in self._iter_chunks(member):
            digest.update(chunk)
            out.write(chunk)
            if on_chunk is not None:
                on_chunk(chunk)
        if base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode() != expected:
            raise DigestMismatch(f"{self.name}: {member} has not the {algorithm} that RECORD gives; pull it again")

    def _iter_chunks(self, member: str) -> Iterator[bytes]:
        with _archive_errors(self.name):
            file = self._archive.open(member)
        with file:
            while True:
                with _archive_errors(self.name):
                    chunk = file.read(_CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk

    def _find_dist_info(self) -> str:
        folders = [path.removesuffix("/RECORD") for path in self._sizes if path.endswith(".dist-info/RECORD")]
        folders = [folder for folder in folders if "/" not in folder]
        if len(folders) != 1:
            raise self._refuse(f"{len(folders)} .dist-info folders with a RECORD, expected one")
        return folders[0]

    def _read_record(self, member: str) -> dict[str, tuple[str, str]]:
        """Algorithm and digest of each member."""
        with _archive_errors(self.name), self._archive.open(member) as file:
            raw = file.read(_MAX_TEXT_BYTES + 1)
        if len(raw) > _MAX_TEXT_BYTES:
            raise self._refuse(f"RECORD is longer than {_MAX_TEXT_BYTES} bytes")
        digests: dict[str, tuple[str, str]] = {}
        for row in self._parse_rows(raw.decode("utf-8", errors="replace")):
            algorithm, _, digest = row[1].partition("=") if len(row) == 3 else ("", "", "")
            if algorithm in _ALGORITHMS:
                digests[row[0]] = (algorithm, digest.rstrip("="))
        return digests

    def _parse_rows(self, text: str) -> list[list[str]]:
        try:
            return list(csv.reader(io.StringIO(text)))
        except csv.Error as error:
            raise self._refuse(f"RECORD is no table: {error}") from error

    def _refuse(self, problem: str) -> PullError:
        return refuse_wheel(self.name, problem)


@contextlib.contextmanager
def open_wheel(path: Path) -> Iterator[Wheel]:
    """Open a wheel for reading.

    Raises:
        PullError: It is no wheel, or one that could harm: encrypted, with links, with paths that leave it, or one that
            would unpack to far more than itself.
        DigestMismatch: Its METADATA is not what RECORD says.
    """
    with _archive_errors(path.name):
        archive = zipfile.ZipFile(path)
    with archive:
        _check_members(path, archive.infolist())
        yield Wheel(path.name, archive)


@contextlib.contextmanager
def _archive_errors(name: str) -> Iterator[None]:
    """Raise `PullError` for whatever `zipfile` raises as it reads."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        raise refuse_wheel(name, f"not a readable archive: {error}") from error


def refuse_wheel(name: str, problem: str) -> PullError:
    """The error for a wheel that cannot be trusted."""
    return PullError(f"{name}: {problem}; nothing was taken from it, report it to whoever made it")


def _check_members(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    if len({info.filename for info in infos}) != len(infos):
        raise refuse_wheel(path.name, "one path occurs twice")
    for info in infos:
        name = info.filename
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise refuse_wheel(path.name, f"the path {name!r} leaves the archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise refuse_wheel(path.name, f"{name} is a link")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse_wheel(path.name, f"{name} is encrypted, or compressed as wheels are not")
    unpacked_bytes, packed_bytes = sum(info.file_size for info in infos), path.stat().st_size
    if unpacked_bytes > packed_bytes * _MAX_EXPANSION:
        raise refuse_wheel(path.name, f"its {packed_bytes} bytes claim to unpack to {unpacked_bytes}")
