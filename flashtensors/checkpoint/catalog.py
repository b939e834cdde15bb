"""Which models are in the store, and what each one is."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from ..errors import DigestMismatch, ModelNotFound, StoreError
from .chunk_digests import ChunkHasher, ModelDigests, write_digests
from .digest import hash_files
from .folders import StoreFolders, Workspace
from .names import ALIASES, check_name, folder_name, is_name
from .progress import Reporter, ReportProgress
from .record import ModelRecord, VerifyReport, find_size

_REMOVE_TIMEOUT_S = 5.0
_NUM_LISTED = 8
"""Most names that an error lists."""

ModelRecords = list[ModelRecord]
StoreErrors = list[StoreError]


class Catalog:
    """The models of one store. Reading needs no lock; any number of processes may use the same store.

    Args:
        store: The store's folder; made by the first pull.
    """

    def __init__(self, store: Path) -> None:
        self.store = Path(store).expanduser().absolute()
        self._folders = StoreFolders(self.store)

    def list(self) -> ModelRecords:
        """Every model, by name; `damaged` has those whose record cannot be read."""
        return sorted(self._read_all()[0], key=lambda record: record.name)

    def damaged(self) -> StoreErrors:
        """One error for each record that cannot be read."""
        return self._read_all()[1]

    def find(self, name: str) -> ModelRecord | None:
        """The model of that name, alias or source; the newest where several share an alias.

        Raises:
            StoreError: Its record is there, but cannot be read.
        """
        if is_name(name) and (record := self._folders.find_record(folder_name(name))) is not None:
            return record
        target = ALIASES.get(name, name)
        matches = [record for record in self.list() if record.is_called(target)]
        return max(matches, key=lambda record: record.created_unix_s, default=None)

    def get(self, name: str) -> ModelRecord:
        """`find`, or `ModelNotFound` that suggests near names, or `InvalidName` where none can be."""
        record = self.find(name)
        if record is not None:
            return record
        check_name(name)
        raise ModelNotFound(f"no model {name!r} in {self.store}; {_hint(name, self.list())}", param="model")

    def verify(self, name: str, progress: ReportProgress | None = None) -> VerifyReport:
        """Re-hash every file of a model and say which are not what was pulled.

        Raises:
            ModelNotFound, InvalidName: As `get`.
            StoreError: A file is there, but the disk does not give its bytes.
        """
        record = self.get(name)
        reporter = Reporter(progress)
        sizes = {file.path: find_size(record.path / file.path) for file in record.files}
        sized = [file for file in record.files if sizes[file.path] == file.num_bytes]
        reporter.begin("verifying", total_bytes=sum(file.num_bytes for file in sized))
        digests = hash_files([record.path / file.path for file in sized], reporter.advance)
        ok = {file.path for file, digest in zip(sized, digests, strict=True) if digest == file.sha256}
        reporter.begin("done")
        return VerifyReport(
            name=record.name,
            ok=[path for path in sizes if path in ok],
            changed=[path for path, size in sizes.items() if size is not None and path not in ok],
            missing=[path for path, size in sizes.items() if size is None],
        )

    def restore_digests(self, record: ModelRecord, sizes: Mapping[Path, int]) -> ModelDigests:
        """Digests of the chunks of weight files, made anew from bytes that have the sha256 that the pull recorded.

        Args:
            record: Of a model with a fixed identity, with a sha256 of each file.
            sizes: Its weights, each with its size; all of them are read.

        Raises:
            DigestMismatch: A file is not what was pulled.
            StoreError: The disk does not give the bytes of a file.
        """
        pulled = {file.path: file for file in record.files}
        for path, num_bytes in sizes.items():
            check_pulled_size(path, num_bytes, pulled[path.name].num_bytes if path.name in pulled else None)
        paths = list(sizes)
        chunks = {path: ChunkHasher() for path in paths}
        digests = hash_files(paths, on_pieces={path: hasher.update for path, hasher in chunks.items()})
        for path, digest in zip(paths, digests, strict=True):
            expected = pulled[path.name].sha256
            if digest != expected:
                raise DigestMismatch(
                    f"{path}: its sha256 is {digest}, but it was {expected} when the model was pulled; pull the model "
                    "again (flash pull --force), and check the disk if that does not help"
                )
        return ModelDigests(
            identity=self.find_fixed_identity(record) or "",
            files={path.name: hasher.digests() for path, hasher in chunks.items()},
        )

    def remove(self, name: str) -> None:
        """Forget a model and remove the files that its pull made; a user's folder or the hub's cache stays.

        A record that cannot be read is removed too.

        Raises:
            ModelNotFound, InvalidName: As `get`.
            StoreError: It is being pulled now.
        """
        key = folder_name(name) if is_name(name) else ""
        if key not in self._folders.list_keys():
            key = folder_name(self.get(name).name)
        with self._folders.hold(key, timeout_s=_REMOVE_TIMEOUT_S) as is_held:
            if not is_held:
                raise StoreError(f"{name} is being pulled or removed by another process; wait for it, or stop it")
            self._folders.remove(key)

    def digests_path(self, record: ModelRecord) -> Path:
        """Where digests of the chunks of a model's files are kept; removed with the model."""
        return self._folders.digests_path(folder_name(record.name))

    def find_fixed_identity(self, record: ModelRecord) -> str | None:
        """What a model's digests belong to whose files nobody edits: the pull's generation, or the hub's commit.

        None for a user's folder, whose digests belong to the files as they are; see `chunk_digests.find_identity`.
        """
        is_fixed = record.revision is not None or self._folders.is_generation(folder_name(record.name), record.path)
        return record.path.name if is_fixed else None

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Be the only one who pulls or removes a model; waits for whoever does."""
        with self._folders.hold(folder_name(name)):
            yield

    def workspace(self, name: str) -> contextlib.AbstractContextManager[Workspace]:
        """Folders for a pull of `name`, whose lock the caller holds; also removes what dead pulls left."""
        return self._folders.workspace(folder_name(name))

    def publish(self, record: ModelRecord, digests: ModelDigests | None = None) -> None:
        """List a model, or replace it; the caller holds its lock, and its files are durable.

        Args:
            record: What to list.
            digests: Of the chunks of its files, as far as they are known.
        """
        key = folder_name(record.name)
        self._folders.write_record(key, record)
        if digests is not None:
            identity = self.find_fixed_identity(record) or digests.identity
            digests = msgspec.structs.replace(digests, identity=identity)
            write_digests(self._folders.digests_path(key), digests)

    def _read_all(self) -> tuple[ModelRecords, StoreErrors]:
        records: ModelRecords = []
        errors: StoreErrors = []
        for key in self._folders.list_keys():
            try:
                record = self._folders.find_record(key)
            except StoreError as error:
                errors.append(error)
            else:
                if record is not None:  # None: removed since the folder was listed
                    records.append(record)
        return records, errors


def check_pulled_size(path: Path, num_bytes: int, pulled_bytes: int | None) -> None:
    """Raise `DigestMismatch` unless a file has the size that was pulled; None: it was not there then."""
    if num_bytes != pulled_bytes:
        expected = "was not there" if pulled_bytes is None else f"had {pulled_bytes}"
        raise DigestMismatch(
            f"{path}: {num_bytes} bytes, but it {expected} when the model was pulled; "
            "pull the model again (flash pull --force)"
        )


def _hint(name: str, records: ModelRecords) -> str:
    """What somebody may have meant who asked for a model that is not there."""
    if name in ALIASES:
        return f"flash pull {name} fetches it"
    known = {alias: alias for alias in ALIASES}
    known |= {text.casefold(): record.name for record in records for text in (record.name, *record.aliases)}
    near = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(dict.fromkeys(known[text] for text in near))}?"
    if not records:
        return "it is empty; flash pull fetches a model"
    rest = f" and {len(records) - _NUM_LISTED} more" if len(records) > _NUM_LISTED else ""
    return f"it has {', '.join(record.name for record in records[:_NUM_LISTED])}{rest}"
