"""Loads in processes of their own: many at once, and above system calls that are interrupted and cut short."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

_INTERRUPTED_READS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

typedef ssize_t (*read_call)(int, const struct iovec *, int, off_t, int);
static __thread unsigned num_calls;

/* Every third call is interrupted; the others read at most 3000 bytes. */
ssize_t preadv64v2(int fd, const struct iovec *vector, int count, off_t offset, int flags) {
    static read_call real;
    if (!real) real = (read_call)dlsym(RTLD_NEXT, "preadv64v2");
    if (++num_calls % 3 == 0) {
        int note = open(getenv("NOTE_OF_FAULTS"), O_WRONLY | O_CREAT | O_APPEND, 0600);
        if (note < 0 || write(note, "!", 1) != 1 || close(note) != 0) abort();
        errno = EINTR;
        return -1;
    }
    struct iovec cut = vector[0];
    if (cut.iov_len > 3000) cut.iov_len = 3000;
    return real(fd, &cut, 1, offset, flags);
}
ssize_t preadv2(int fd, const struct iovec *vector, int count, off_t offset, int flags) {
    return preadv64v2(fd, vector, count, offset, flags);
}
ssize_t preadv64(int fd, const struct iovec *vector, int count, off_t offset) {
    return preadv64v2(fd, vector, count, offset, 0);
}
ssize_t preadv(int fd, const struct iovec *vector, int count, off_t offset) {
    return preadv64v2(fd, vector, count, offset, 0);
}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of about a megabyte in all."""
    folder = tmp_path / "model"
    folder.mkdir()
    for shard in range(2):
        tensors = {f"{shard}.{index}": torch.randn(100 + index, 333).bfloat16() for index in range(8)}
        safetensors.torch.save_file(tensors, folder / f"part-{shard}.safetensors")
    return folder


def load_at_once(folder: Path, num_processes: int, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.transfer.load_at_once", str(folder), str(num_processes)]
    root = Path(__file__).parents[2]
    return subprocess.run(
        command, cwd=root, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False
    )


def test_many_processes_load_one_model_at_once(folder: Path):
    ended = load_at_once(folder, 32)
    assert ended.returncode == 0, ended.stderr


def test_one_damaged_byte_is_seen_by_the_oracle(folder: Path):
    """The program above must be able to fail: here the bytes change between the load and the comparison."""
    program = (
        "import sys; from pathlib import Path; from tests.transfer import load_at_once as program;"
        "program.read_as_specified = lambda path: {'0.0': b''};"
        "sys.exit(program.main(Path(sys.argv[1]), 3))"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], cwd=root, timeout=120, check=False)
    assert ended.returncode == 3


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="no C compiler")
def test_interrupted_system_calls_are_made_again(folder: Path, tmp_path: Path):
    source, library, note = tmp_path / "reads.c", tmp_path / "reads.so", tmp_path / "note"
    source.write_text(_INTERRUPTED_READS)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True, timeout=60)
    ended = load_at_once(folder, 3, LD_PRELOAD=str(library), NOTE_OF_FAULTS=str(note))
    assert ended.returncode == 0, ended.stderr
    assert note.stat().st_size > 100, "no call was interrupted"
