"""Reads each chunk the quicker way: from the page cache what is in it, from the disk what is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...closing import Closing
from ...errors import CheckpointError
from ..file_state import FileState
from ..probe import FileSystemProbe, refuses_direct, shared_probe
from .buffered import BufferedReader
from .direct import DirectReader
from .files import Reader
from .page_cache import PageCache

MIN_CACHED_SHARE = 0.75
"""A chunk of which the page cache holds less than this is read from the disk as a whole."""


class AutomaticReader(Closing):
    """Asks the kernel about each read; where a file system refuses O_DIRECT, its files are read buffered.

    Args:
        files: Each file with the state that it had when it was planned.
        probe: What is known about file systems; None: what this process knows.

    Raises:
        FileChanged, CheckpointError: As `OpenFiles`.
    """

    def __init__(self, files: Mapping[Path, FileState], *, probe: FileSystemProbe | None = None) -> None:
        self._page_cache = PageCache()
        self._used: set[str] = set()
        self._buffered = BufferedReader(files)
        try:
            self._direct, self._direct_paths = _open_direct(files, probe or shared_probe())
        except BaseException:
            self._buffered.close()
            raise

    @property
    def name(self) -> str:
        """The readers that were used: `direct`, `buffered`, both, or `none`."""
        return " and ".join(sorted(self._used, reverse=True)) or "none"

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of the file at `path` from byte `offset`.

        Raises:
            TruncatedFile: The file ends first.
            TransferError: The system reports an error.
        """
        reader = self.choose(path, offset, len(buffer))
        reader.read_into(path, offset, buffer)
        self._used.add(reader.name)

    def choose(self, path: Path, offset: int, num_bytes: int) -> Reader:
        """The reader that would read those bytes now."""
        if self._direct is not None and path in self._direct_paths and not self._is_cached(path, offset, num_bytes):
            return self._direct
        return self._buffered

    def close(self) -> None:
        """Close the files."""
        if self._direct is not None:
            self._direct.close()
        self._buffered.close()

    def _is_cached(self, path: Path, offset: int, num_bytes: int) -> bool:
        share = self._page_cache.find_share(self._buffered.fd(path), offset - offset % 4096, num_bytes)
        return share is not None and share >= MIN_CACHED_SHARE


def _open_direct(
    files: Mapping[Path, FileState], probe: FileSystemProbe
) -> tuple[DirectReader | None, frozenset[Path]]:
    """Open the files that may be read directly; none of them where a file system turns out to be another one."""
    direct_files = {path: state for path, state in files.items() if probe.file_system(path).accepts_direct}
    if not direct_files:
        return None, frozenset()
    try:
        return DirectReader(direct_files), frozenset(direct_files)
    except CheckpointError as error:
        if not refuses_direct(error.__cause__):
            raise
        probe.forget()
        return None, frozenset()
