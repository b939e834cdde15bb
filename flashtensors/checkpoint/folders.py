"""The store on disk.

    catalog/<key>.json          the record of one model; a model is listed if and only if this file exists
    catalog/<key>.digests       digests of the chunks of its files, as far as they have been read
    models/<key>/<generation>/  files that a pull made itself
    scratch/<key>/              downloads on their way; nothing in it is ever read by another pull
    locks/<key>.lock            held while a model is pulled or removed

A record is published last, by one rename, when every byte it speaks of is durable. Whatever no record speaks of is the
rest of a pull that died, and is removed by the next one. A key is `names.folder_name` of the model's name.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ..errors import StoreError
from .chunk_digests import digests_path
from .durable import disk_errors, remove_tree, replace_file, sync_folder
from .locks import hold_lock
from .names import folder_name, is_name
from .record import ModelRecord, damaged_record, decode_record, encode_record


class Workspace(msgspec.Struct, frozen=True):
    """Two empty folders on the store's file system, for one pull."""

    scratch: Path
    """Removed when the pull ends."""
    generation: Path
    """Kept if a record that names it was published; removed otherwise."""


class StoreFolders:
    """Reads, replaces and sweeps the folders of one store.

    Args:
        store: The store's folder; made by the first lock.
    """

    def __init__(self, store: Path) -> None:
        self.store = store

    def list_keys(self) -> list[str]:
        """Keys of all models that are listed."""
        return sorted(path.stem for path in (self.store / "catalog").glob("*.json"))

    def find_record(self, key: str) -> ModelRecord | None:
        """The record of a key; raises `StoreError` when it is there and cannot be read."""
        path = self._record_path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise damaged_record(path, error.strerror or str(error)) from error
        record = decode_record(data, path)
        if not is_name(record.name) or folder_name(record.name) != key:
            raise damaged_record(path, f"it is of another model, {record.name!r}")
        return msgspec.structs.replace(record, folder=str(self.store / record.folder))

    def write_record(self, key: str, record: ModelRecord) -> None:
        """Replace the record of a key whose lock is held; the files it speaks of are durable."""
        with contextlib.suppress(ValueError):  # files outside the store keep their absolute path
            record = msgspec.structs.replace(record, folder=str(record.path.relative_to(self.store)))
        folder, models, scratch = self.store / "catalog", self.store / "models" / key, self.store / "scratch" / key
        with disk_errors(self.store):
            for path in (folder, models, scratch):
                path.mkdir(parents=True, exist_ok=True)
            for path in (models, models.parent, self.store):
                sync_folder(path)
            replace_file(self._record_path(key), encode_record(record), scratch / "record.json")

    def remove(self, key: str) -> None:
        """Remove the record of a key whose lock is held, then the files that were made for it."""
        with disk_errors(self.store):
            self._record_path(key).unlink(missing_ok=True)
            self.digests_path(key).unlink(missing_ok=True)
            sync_folder(self._record_path(key).parent)
            self._sweep(key)

    @contextlib.contextmanager
    def hold(self, key: str, *, timeout_s: float = -1.0) -> Iterator[bool]:
        """Hold the lock of a key; yields whether it was got within the timeout (negative: wait for ever)."""
        path = self.store / "locks" / f"{key}.lock"
        with contextlib.ExitStack() as stack:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                is_held = stack.enter_context(hold_lock(path, timeout_s=timeout_s))
            yield is_held

    @contextlib.contextmanager
    def workspace(self, key: str) -> Iterator[Workspace]:
        """Folders for a pull of a key whose lock is held; also removes what dead pulls of any model left."""
        generation = secrets.token_hex(8)
        workspace = Workspace(self.store / "scratch" / key / generation, self.store / "models" / key / generation)
        with disk_errors(self.store):
            self._sweep(key)
            self._sweep_others(key)
            workspace.scratch.mkdir(parents=True)
            workspace.generation.mkdir(parents=True)
        try:
            yield workspace
        finally:
            with disk_errors(self.store):
                self._sweep(key)

    def digests_path(self, key: str) -> Path:
        """Where digests of a model's chunks are kept."""
        return digests_path(self._record_path(key))

    def is_generation(self, key: str, folder: Path) -> bool:
        """Whether `folder` was made by a pull of that key, and not by a user."""
        return folder.parent == self.store / "models" / key

    def _record_path(self, key: str) -> Path:
        return self.store / "catalog" / f"{key}.json"

    def _sweep(self, key: str) -> None:
        """Remove what no record speaks of, of one model whose lock is held."""
        remove_tree(self.store / "scratch" / key)
        try:
            record = self.find_record(key)
        except StoreError:
            return  # a person may mend the record; until a pull replaces it, its files stay
        generations = self.store / "models" / key
        if record is None or not self.is_generation(key, record.path):
            remove_tree(generations)
            return
        for generation in generations.iterdir():
            if generation != record.path:
                remove_tree(generation)

    def _sweep_others(self, own_key: str) -> None:
        keys = {path.name for kind in ("scratch", "models") for path in (self.store / kind).glob("*")}
        for key in keys - {own_key}:
            with self.hold(key, timeout_s=0.0) as is_held:
                if is_held:
                    self._sweep(key)
