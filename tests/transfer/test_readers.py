"""Every reader against the bytes on disk, with every fault that a disk has, and the choice between them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from flashtensors.errors import CheckpointError, FileChanged, TransferError, TruncatedFile
from flashtensors.transfer.file_state import FileState
from flashtensors.transfer.probe import FileSystem, FileSystemProbe
from flashtensors.transfer.readers.automatic import AutomaticReader
from flashtensors.transfer.readers.buffered import BufferedReader
from flashtensors.transfer.readers.direct import DirectReader
from flashtensors.transfer.readers.files import Preadv
from flashtensors.transfer.readers.page_cache import PageCache

NUM_BYTES = 5 * 4096 + 123
READERS = [BufferedReader, DirectReader]
MakeReader = Callable[..., BufferedReader | DirectReader]


@pytest.fixture
def data() -> bytes:
    return random.Random(0).randbytes(NUM_BYTES)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(data)
    return path


def files(path: Path) -> dict[Path, FileState]:
    return {path: FileState.of(path)}


def aligned(num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, max(num_bytes, 1)))[:num_bytes]


RANGES = [(0, NUM_BYTES), (0, 4096), (4096, 8192), (1, 5000), (4096, NUM_BYTES - 4096), (NUM_BYTES - 1, 1), (8192, 0)]


@pytest.mark.parametrize("make_reader", READERS)
@pytest.mark.parametrize(("offset", "num_bytes"), RANGES)
def test_any_range_is_the_bytes_on_disk(path: Path, data: bytes, make_reader: MakeReader, offset: int, num_bytes: int):
    with make_reader(files(path)) as reader:
        buffer = aligned(num_bytes)
        reader.read_into(path, offset, buffer)
        assert bytes(buffer) == data[offset : offset + num_bytes]


def test_a_buffer_that_is_not_aligned_is_filled_all_the_same(path: Path, data: bytes):
    with DirectReader(files(path)) as reader:
        buffer = aligned(NUM_BYTES + 1)[1:]
        reader.read_into(path, 0, buffer)
        assert bytes(buffer) == data


def test_direct_reads_are_aligned_and_bounded(path: Path):
    asked: list[tuple[int, int]] = []

    def note(fd: int, buffers: list[memoryview], offset: int) -> int:
        asked.append((offset, len(buffers[0])))
        return os.preadv(fd, buffers, offset)

    with DirectReader(files(path), preadv=note, read_bytes=8192) as reader:
        reader.read_into(path, 0, aligned(NUM_BYTES))
    assert asked == [(0, 8192), (8192, 8192), (16384, 4096), (20480, 123)]


def short(num_bytes: int) -> Preadv:
    return lambda fd, buffers, offset: os.preadv(fd, [buffers[0][:num_bytes]], offset)


def failing(code: int, from_offset: int = 0) -> Preadv:
    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= from_offset:
            raise OSError(code, os.strerror(code))
        return os.preadv(fd, [buffers[0][: from_offset - offset]], offset)

    return preadv


@pytest.mark.parametrize("make_reader", READERS)
@pytest.mark.parametrize("num_bytes", [4096, 512])
def test_short_reads_are_continued(path: Path, data: bytes, make_reader: MakeReader, num_bytes: int):
    with make_reader(files(path), preadv=short(num_bytes)) as reader:
        buffer = aligned(NUM_BYTES)
        reader.read_into(path, 0, buffer)
        assert bytes(buffer) == data


@pytest.mark.parametrize("make_reader", READERS)
def test_an_io_error_names_file_and_offset(path: Path, make_reader: MakeReader):
    with (
        make_reader(files(path), preadv=failing(errno.EIO, 8192)) as reader,
        pytest.raises(TransferError, match=rf"{path}: reading \d+ bytes at byte 8192 failed: Input/output error"),
    ):
        reader.read_into(path, 0, aligned(NUM_BYTES))


def test_a_direct_read_that_is_refused_goes_through_the_page_cache(path: Path, data: bytes):
    refused: list[int] = []

    def refuse_long(fd: int, buffers: list[memoryview], offset: int) -> int:
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no")
        return os.preadv(fd, buffers, offset)

    with DirectReader(files(path), preadv=refuse_long) as reader:
        buffer = aligned(NUM_BYTES)
        reader.read_into(path, 0, buffer)
        assert bytes(buffer) == data
    assert refused == [0]


@pytest.mark.parametrize("make_reader", READERS)
def test_a_file_that_is_cut_while_it_is_read(path: Path, make_reader: MakeReader):
    with make_reader(files(path)) as reader:
        os.truncate(path, 10_000)
        with pytest.raises(TruncatedFile, match=f"{path}: the file ends at byte 10000, but bytes up to {NUM_BYTES}"):
            reader.read_into(path, 0, aligned(NUM_BYTES))


@pytest.mark.parametrize("make_reader", [*READERS, AutomaticReader])
def test_files_that_are_not_the_planned_ones_are_refused(path: Path, make_reader: MakeReader):
    planned = files(path)
    num_open = len(os.listdir("/proc/self/fd"))
    os.utime(path, ns=(0, 0))
    with pytest.raises(FileChanged, match="was replaced"):
        make_reader(planned)
    os.truncate(path, 5)
    with pytest.raises(FileChanged, match=rf"{path}: the file was replaced .*{NUM_BYTES} bytes then, 5 now"):
        make_reader(planned)
    path.unlink()
    with pytest.raises(FileChanged, match="was removed"):
        make_reader(planned)
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_far_offsets_of_sparse_files(tmp_path: Path):
    path = tmp_path / "sparse"
    offset = 5 * 2**30
    with open(path, "wb") as file:
        file.seek(offset)
        file.write(b"far away")
    for make_reader in READERS:
        with make_reader(files(path)) as reader:
            buffer = aligned(8192)
            reader.read_into(path, offset - 4096, buffer[: 4096 + 8])
            assert bytes(buffer[4096:4104]) == b"far away"
            assert not any(buffer[:4096])


# What the kernel says about its page cache.


def drop_from_page_cache(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def find_share(path: Path, page_cache: PageCache, offset: int = 0) -> float | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return page_cache.find_share(fd, offset, NUM_BYTES - offset)
    finally:
        os.close(fd)


class WithoutCachestat(PageCache):
    """An older kernel."""

    def __init__(self) -> None:
        super().__init__()
        self._has_cachestat = False


@pytest.mark.parametrize("make_page_cache", [PageCache, WithoutCachestat])
def test_the_kernel_says_what_is_cached(path: Path, make_page_cache: type[PageCache]):
    page_cache = make_page_cache()
    path.read_bytes()
    assert find_share(path, page_cache) == 1.0
    assert find_share(path, page_cache, offset=8192) == 1.0
    drop_from_page_cache(path)
    if find_share(path, page_cache) == 1.0:
        pytest.skip("this file system keeps its files in memory")
    assert find_share(path, page_cache) == 0.0
    fd = os.open(path, os.O_RDONLY)
    assert page_cache.find_share(fd, 0, 0) == 1.0
    os.close(fd)


class LibcOfAStranger:
    """A kernel that refuses `cachestat` with an error, and has `mincore` call every page cached."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.num_asked = 0

    def syscall(self, *arguments: object) -> int:
        self.num_asked += 1
        ctypes.set_errno(self.code)
        return -1

    def mincore(self, address: object, num_bytes: ctypes.c_size_t, is_cached: ctypes.Array[ctypes.c_ubyte]) -> int:
        is_cached[:] = [1] * len(is_cached)
        return 0


def ask_as(
    monkeypatch: pytest.MonkeyPatch, path: Path, libc: LibcOfAStranger, *, owns: bool, may_write: bool
) -> list[float | None]:
    """What two questions are answered."""
    page_cache = PageCache()
    monkeypatch.setattr(page_cache, "_libc", libc)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + (not owns))
    monkeypatch.setattr(os, "access", lambda *args, **options: may_write)
    return [find_share(path, page_cache) for _ in range(2)]


@pytest.mark.parametrize(("owns", "may_write"), [(True, False), (False, True), (False, False)])
def test_the_kernel_s_word_on_files_of_others_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, path: Path, owns: bool, may_write: bool
):
    libc = LibcOfAStranger(errno.EPERM)
    expected = 1.0 if owns or may_write else None
    assert ask_as(monkeypatch, path, libc, owns=owns, may_write=may_write) == [expected] * 2
    assert libc.num_asked == 2, "one file was refused, not the call"


def test_a_call_that_the_kernel_does_not_have_is_made_once(monkeypatch: pytest.MonkeyPatch, path: Path):
    libc = LibcOfAStranger(errno.ENOSYS)
    assert ask_as(monkeypatch, path, libc, owns=True, may_write=True) == [1.0, 1.0]
    assert libc.num_asked == 1


def test_where_the_kernel_does_not_say_files_are_read_from_the_disk(
    monkeypatch: pytest.MonkeyPatch, path: Path, data: bytes
):
    monkeypatch.setattr(PageCache, "find_share", lambda self, fd, offset, num_bytes: None)
    assert read_all(path, OneAnswer(accepts_direct=True)) == (data, "direct")
    assert read_all(path, OneAnswer(accepts_direct=False)) == (data, "buffered")


class OneAnswer(FileSystemProbe):
    """Says the same of every file system."""

    def __init__(self, accepts_direct: bool) -> None:
        super().__init__()
        self.answer = FileSystem(kind="fake", accepts_direct=accepts_direct, reason="so it is")

    def file_system(self, path: Path) -> FileSystem:
        return self.answer


def read_all(path: Path, probe: FileSystemProbe) -> tuple[bytes, str]:
    buffer = aligned(NUM_BYTES)
    with AutomaticReader(files(path), probe=probe) as reader:
        assert reader.name == "none"
        reader.read_into(path, 0, buffer)
        return bytes(buffer), reader.name


def test_what_is_in_the_page_cache_is_read_from_it(path: Path, data: bytes):
    path.read_bytes()
    assert read_all(path, OneAnswer(accepts_direct=True)) == (data, "buffered")


def test_what_is_not_is_read_from_the_disk(path: Path, data: bytes):
    drop_from_page_cache(path)
    if find_share(path, PageCache()) == 1.0:
        pytest.skip("this file system keeps its files in memory")
    assert read_all(path, OneAnswer(accepts_direct=True)) == (data, "direct")
    drop_from_page_cache(path)
    assert read_all(path, OneAnswer(accepts_direct=False)) == (data, "buffered")


def test_a_file_system_is_asked_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    probe = FileSystemProbe()
    found = probe.file_system(path)
    (tmp_path / "other").touch()
    monkeypatch.setattr(os, "open", lambda *args: pytest.fail("asked again"))
    assert probe.file_system(tmp_path / "other") is found


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be opened with O_DIRECT."""
    open_file = os.open

    def refuse_direct(path: str, flags: int, *args: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_file(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse_direct)


def test_a_refusal_is_remembered_with_its_reason(path: Path, data: bytes, refusal: None):
    probe = FileSystemProbe()
    assert not probe.file_system(path).accepts_direct
    assert "refuses O_DIRECT (Invalid argument)" in probe.file_system(path).reason
    drop_from_page_cache(path)
    assert read_all(path, probe) == (data, "buffered")


def test_readers_share_what_this_process_has_found_out(path: Path, monkeypatch: pytest.MonkeyPatch):
    AutomaticReader(files(path)).close()
    monkeypatch.setattr("flashtensors.transfer.probe._try_direct", lambda *args: pytest.fail("asked again"))
    AutomaticReader(files(path)).close()


def test_another_file_system_in_the_place_of_one_that_was_known_is_asked_anew(path: Path, data: bytes, refusal: None):
    known = FileSystemProbe()
    known._found[path.stat().st_dev] = FileSystem(kind="gone", accepts_direct=True, reason="it did")
    drop_from_page_cache(path)
    assert read_all(path, known) == (data, "buffered")
    assert not known.file_system(path).accepts_direct


def test_memory_file_systems_are_read(data: bytes):
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("no tmpfs here")
    path = memory / f"flashtensors-test-{os.getpid()}"
    path.write_bytes(data)
    try:
        probe = FileSystemProbe()
        assert read_all(path, probe) == (data, "buffered")
        assert probe.file_system(path).kind == "tmpfs"
    finally:
        path.unlink()


def test_a_file_that_is_not_there_cannot_be_probed(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        FileSystemProbe().file_system(tmp_path / "nothing")
