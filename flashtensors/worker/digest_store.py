"""Digests of a model's chunks: recorded by the pull or when they are first read, compared ever after."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.catalog import Catalog, check_pulled_size
from ..checkpoint.chunk_digests import DigestCheck, ModelDigests, find_identity, read_digests, write_digests
from ..checkpoint.record import ModelRecord
from ..errors import StoreError
from ..transfer.chunk_reads import check_chunks
from ..transfer.load_plan import LoadPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DigestsFile:
    """Where the store keeps digests of a model that it lists."""

    catalog: Catalog
    record: ModelRecord

    @property
    def path(self) -> Path:
        """The file; it may be absent."""
        return self.catalog.digests_path(self.record)

    @property
    def fixed_identity(self) -> str | None:
        """Of files that nobody edits, whatever their time of change; None: a user's files, which may become others."""
        return self.catalog.find_fixed_identity(self.record)


class KnownDigests:
    """What is known of the files of one plan.

    A pull's digests hold for good; where they are lost, they are made anew from files that have the sha256 that the
    pull recorded, which reads all of them once. Those of a user's folder belong to files of one size and time of
    change, so they are not held against a file that was put in the place of another.

    Args:
        plan: Whose files.
        kept: Where digests are kept; None: as long as there are plans of the same files.
        earlier: Of the model's last plan. Chunks that its load found damaged are read again now, so that a model
            whose files still are fails before another has to leave for it.

    Raises:
        DigestMismatch: A file has another size than the one that was pulled, or was not among them; or its digests are
            lost and its bytes are not those that were pulled; or a chunk is still damaged.
        StoreError: Digests are there, or are made anew, but the disk does not give the bytes.
    """

    def __init__(self, plan: LoadPlan, kept: DigestsFile | None, earlier: KnownDigests | None = None) -> None:
        self._path = None if kept is None else kept.path
        states = ((file.name, state.num_bytes, state.modified_ns) for file, state in plan.files.items())
        fixed_identity = None if kept is None else kept.fixed_identity
        self._identity = fixed_identity or find_identity(states)
        known = None if self._path is None else read_digests(self._path, self._identity)
        if kept is not None and fixed_identity is not None:
            known = _check_pulled(plan, kept, known)
        if known is None and earlier is not None and earlier._identity == self._identity:
            known = earlier.check.digests(self._identity)
        self.check = DigestCheck({file: state.num_bytes for file, state in plan.files.items()}, known)
        """Compares and remembers; for every load of the plan."""
        self._num_saved = 0
        if earlier is not None:
            sizes = {path: state.num_bytes for path, state in plan.files.items()}
            damaged = [(path, offset) for path, offset in earlier.check.damaged if offset < sizes.get(path, 0)]
            check_chunks(plan, damaged, self.check, num_threads=1, cancel=threading.Event())

    def save(self) -> None:
        """Keep what was recorded since the last time; a disk that refuses costs the digests, not the load."""
        num_recorded = self.check.num_recorded
        if self._path is None or num_recorded == self._num_saved:
            return
        self._num_saved = num_recorded
        _write(self._path, self.check.digests(self._identity))


def find_digests_file(store: Path, model: str, folder: Path) -> DigestsFile | None:
    """Where the store keeps digests of the model in `folder`; None for one that the store does not list."""
    catalog = Catalog(store)
    try:
        record = catalog.find(model)
    except StoreError:
        return None
    if record is None or record.path.absolute() != folder.absolute():
        return None
    return DigestsFile(catalog, record)


def _check_pulled(plan: LoadPlan, kept: DigestsFile, known: ModelDigests | None) -> ModelDigests | None:
    """Hold a pull's files to their sizes; returns what is known of their chunks, all of it where that can be made."""
    sizes = {path: state.num_bytes for path, state in plan.files.items()}
    if known is not None:
        for path, num_bytes in sizes.items():
            of_file = known.files.get(path.name)
            check_pulled_size(path, num_bytes, None if of_file is None else of_file.num_bytes)
        if all(None not in known.files[path.name].xxh3_64 for path in sizes):
            return known
    record = kept.record
    if not all(file.sha256 for file in record.files):
        return known
    _log.warning(
        "%s: digests of its chunks are lost; before it is loaded, %.1f GB are read and held to the sha256 of its pull",
        record.name,
        sum(sizes.values()) / 1e9,
    )
    restored = kept.catalog.restore_digests(record, sizes)
    _write(kept.path, restored)
    return restored


def _write(path: Path, digests: ModelDigests) -> None:
    try:
        write_digests(path, digests)
    except StoreError as error:
        _log.warning("digests are not kept, and are made again by the next process that loads the model: %s", error)
