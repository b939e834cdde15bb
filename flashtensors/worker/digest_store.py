"""Digests of a model's chunks: recorded by the pull or when they are first read, compared ever after."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.catalog import Catalog
from ..checkpoint.chunk_digests import DigestCheck, ModelDigests, find_identity, read_digests, write_digests
from ..errors import DigestMismatch, StoreError
from ..transfer.load_plan import LoadPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DigestsFile:
    """Where the store keeps digests of a model."""

    path: Path
    fixed_identity: str | None
    """Of files that nobody edits, whatever their time of change; None: a user's files, which may become others."""


class KnownDigests:
    """What is known of the files of one plan.

    A pull's digests hold for good. Those of a user's folder belong to files of one size and time of change, so they
    are not held against a file that was put in the place of another.

    Args:
        plan: Whose files.
        kept: Where digests are kept; None: as long as the plan.

    Raises:
        DigestMismatch: A file has another size than the one that was pulled, or was not among them.
        StoreError: Digests are there, but cannot be read.
    """

    def __init__(self, plan: LoadPlan, kept: DigestsFile | None) -> None:
        self._path = None if kept is None else kept.path
        states = ((file.name, state.num_bytes, state.modified_ns) for file, state in plan.files.items())
        fixed_identity = None if kept is None else kept.fixed_identity
        self._identity = fixed_identity or find_identity(states)
        known = None if self._path is None else read_digests(self._path, self._identity)
        if known is not None and fixed_identity is not None:
            _check_sizes(plan, known)
        self.check = DigestCheck({file: state.num_bytes for file, state in plan.files.items()}, known)
        """Compares and remembers; for every load of the plan."""
        self._num_saved = 0

    def save(self) -> None:
        """Keep what was recorded since the last time; a disk that refuses costs the digests, not the load."""
        num_recorded = self.check.num_recorded
        if self._path is None or num_recorded == self._num_saved:
            return
        self._num_saved = num_recorded
        try:
            write_digests(self._path, self.check.digests(self._identity))
        except StoreError as error:
            _log.warning("the digests of this load are not kept: %s", error)


def find_digests_file(store: Path, model: str, folder: Path) -> DigestsFile | None:
    """Where the store keeps digests of the model in `folder`; None for one that the store does not list."""
    catalog = Catalog(store)
    try:
        record = catalog.find(model)
    except StoreError:
        return None
    if record is None or record.path.absolute() != folder.absolute():
        return None
    return DigestsFile(catalog.digests_path(record), catalog.find_fixed_identity(record))


def _check_sizes(plan: LoadPlan, known: ModelDigests) -> None:
    for file, state in plan.files.items():
        pulled = known.files.get(file.name)
        if pulled is None or pulled.num_bytes != state.num_bytes:
            expected = "was not there" if pulled is None else f"had {pulled.num_bytes}"
            raise DigestMismatch(
                f"{file}: {state.num_bytes} bytes, but it {expected} when the model was pulled; "
                "pull the model again (flash pull --force)"
            )
