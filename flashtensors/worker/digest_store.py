"""Digests of a model's chunks: recorded by the pull or when they are first read, compared ever after."""

from __future__ import annotations

import logging
from pathlib import Path

from ..checkpoint.catalog import Catalog
from ..checkpoint.chunk_digests import DigestCheck, find_identity, read_digests, write_digests
from ..errors import StoreError
from ..transfer.load_plan import LoadPlan

_log = logging.getLogger(__name__)


class KnownDigests:
    """What is known of the files of one plan.

    Digests belong to files of one size and time of change, so those of a file that was replaced are not held against
    its successor.

    Args:
        plan: Whose files.
        path: Where digests are kept; None: as long as the plan.
    """

    def __init__(self, plan: LoadPlan, path: Path | None) -> None:
        self._path = path
        states = ((file.name, state.num_bytes, state.modified_ns) for file, state in plan.files.items())
        self._identity = find_identity(states)
        known = None if path is None else read_digests(path, self._identity)
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


def find_digests_path(store: Path, model: str, folder: Path) -> Path | None:
    """Where the store keeps digests of the model in `folder`; None for one that the store does not list."""
    catalog = Catalog(store)
    try:
        record = catalog.find(model)
    except StoreError:
        return None
    is_this = record is not None and record.path.absolute() == folder.absolute()
    return catalog.digests_path(record) if record is not None and is_this else None
