"""Digests of the chunks of a model's files, quick enough to check whenever the files are read.

sha256 (one thread: about 1 GB/s) says at pull time what a file is; XXH3 (https://xxhash.com, 64 bits, 10 to 20 GB/s a
thread) says at every load that the disk still gives those bytes, and where it does not. It guards against decay and
torn writes, not against somebody who means harm.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import xxhash

from ..errors import DigestMismatch, StoreError
from .durable import disk_errors, replace_file

DIGEST_CHUNK_BYTES = 16 * 1024**2
"""Bytes of a file under one digest; the last chunk of a file may be shorter."""
FORMAT_VERSION = 1
"""Version of the file's fields; a file of another version is as good as none."""

Buffer = bytes | bytearray | memoryview


class FileDigests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of one file."""

    num_bytes: int
    xxh3_64: tuple[int | None, ...]
    """Of each chunk, in order; None where it has not been read yet."""


class ModelDigests(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of the files of one model."""

    format_version: int = FORMAT_VERSION
    chunk_bytes: int = DIGEST_CHUNK_BYTES
    identity: str = ""
    """Of the files, so that their digests are not held against files that rightly replaced them; see
    `Catalog.find_fixed_identity` and `find_identity`."""
    files: dict[str, FileDigests]
    """By name, relative to the model's folder."""


def find_identity(files: Iterable[tuple[str, int, int]]) -> str:
    """Digest of the names, sizes and times of change (in ns) of a model's weight files, in any order."""
    return hashlib.sha256(repr(sorted(files)).encode()).hexdigest()


class ChunkHasher:
    """Digests of one file's chunks, from its bytes in order: for whoever reads the file for other reasons."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._whole: list[int] = []
        self._chunk = xxhash.xxh3_64()

    def update(self, piece: memoryview) -> None:
        """Take in the next bytes, of any length. Other threads run meanwhile."""
        while len(piece) > 0:
            room_bytes = DIGEST_CHUNK_BYTES - self._num_bytes % DIGEST_CHUNK_BYTES
            part, piece = piece[:room_bytes], piece[room_bytes:]
            self._chunk.update(part)
            self._num_bytes += len(part)
            if len(part) == room_bytes:
                self._whole.append(self._chunk.intdigest())
                self._chunk.reset()

    def digests(self) -> FileDigests:
        """Of all bytes so far; the last chunk may be shorter."""
        has_rest = self._num_bytes % DIGEST_CHUNK_BYTES > 0
        rest = (self._chunk.intdigest(),) if has_rest else ()
        return FileDigests(num_bytes=self._num_bytes, xxh3_64=(*self._whole, *rest))


def hash_chunk(data: Buffer) -> int:
    """XXH3-64 of a chunk. Other threads run meanwhile."""
    return xxhash.xxh3_64_intdigest(data)


class DigestCheck:
    """Compares chunks with what is known of them, and remembers those of which nothing was; from any thread.

    Args:
        sizes: The files, each with its size.
        known: What earlier reads found; of a file of another size nothing is taken.
    """

    def __init__(self, sizes: Mapping[Path, int], known: ModelDigests | None = None) -> None:
        self._digests: dict[Path, list[int | None]] = {}
        self.num_checked = 0
        """Chunks that were compared."""
        self.num_recorded = 0
        """Chunks that were hashed for the first time."""
        self.damaged: set[tuple[Path, int]] = set()
        """Chunks that were not what they had been, by file and first byte."""
        for path, num_bytes in sizes.items():
            of_file = known.files.get(path.name) if known is not None else None
            is_known = of_file is not None and of_file.num_bytes == num_bytes
            num_chunks = -(-num_bytes // DIGEST_CHUNK_BYTES)
            chunks = list(of_file.xxh3_64) if of_file is not None and is_known else []
            self._digests[path] = chunks if len(chunks) == num_chunks else [None] * num_chunks
        self._sizes = dict(sizes)

    def check(self, path: Path, offset: int, data: memoryview) -> None:
        """Check the chunks in `data`, which was read from byte `offset`, a multiple of `DIGEST_CHUNK_BYTES`.

        What lies beyond the last whole chunk is left out, unless it ends the file.

        Raises:
            DigestMismatch: A chunk is not what it was; the message names the file, the chunk and the remedy.
        """
        end = min(offset + len(data), self._sizes[path])
        for start in range(offset, end, DIGEST_CHUNK_BYTES):
            stop = min(start + DIGEST_CHUNK_BYTES, self._sizes[path])
            if stop <= end:
                self._check_chunk(path, start, data[start - offset : stop - offset])

    def digests(self, identity: str = "") -> ModelDigests:
        """All that is known by now."""
        return ModelDigests(
            chunk_bytes=DIGEST_CHUNK_BYTES,
            identity=identity,
            files={
                path.name: FileDigests(num_bytes=self._sizes[path], xxh3_64=tuple(chunks))
                for path, chunks in self._digests.items()
            },
        )

    def _check_chunk(self, path: Path, start: int, chunk: memoryview) -> None:
        index = start // DIGEST_CHUNK_BYTES
        found = hash_chunk(chunk)
        expected = self._digests[path][index]
        if expected is None:
            self._digests[path][index] = found
            self.num_recorded += 1
        elif expected == found:
            self.num_checked += 1
        else:
            self.damaged.add((path, start))
            raise DigestMismatch(
                f"{path}: chunk {index} (bytes {start} to {start + len(chunk)}) has the digest {found:016x}, expected "
                f"{expected:016x}; the file changed or the disk returns wrong bytes: pull the model again "
                "(flash pull --force), and check the disk if that does not help"
            )


def digests_path(record_path: Path) -> Path:
    """Where the digests of a model lie: beside its record."""
    return record_path.with_suffix(".digests")


def read_digests(path: Path, identity: str = "") -> ModelDigests | None:
    """The digests in `path`; None where there are none of that identity, or none that this version reads.

    Raises:
        StoreError: The file is there, but cannot be read.
    """
    try:
        digests = msgspec.json.decode(path.read_bytes(), type=ModelDigests)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; check the disk and the permissions") from error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None  # torn, or of another version: made again by the next load
    wanted = (FORMAT_VERSION, DIGEST_CHUNK_BYTES, identity)
    return digests if (digests.format_version, digests.chunk_bytes, digests.identity) == wanted else None


def write_digests(path: Path, digests: ModelDigests) -> None:
    """Keep digests in `path`, at once and durably; raises `DiskFull` or `StoreError`."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with disk_errors(path):
            replace_file(path, msgspec.json.encode(digests) + b"\n", scratch)
    finally:
        scratch.unlink(missing_ok=True)
