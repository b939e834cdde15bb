import os

import pytest

from flashtensors.config import Settings
from flashtensors.server.host_memory_file import open_host_memory_file

needs_memory_files = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory files are Linux's")


@needs_memory_files
def test_the_file_is_as_long_as_the_pool_in_whole_memory_pages() -> None:
    with open_host_memory_file(Settings(device="cuda", mem_pool_size=10_000_000)) as fd:
        assert fd is not None
        assert os.fstat(fd).st_size == 10_000_000 // 4096 * 4096
        assert os.fstat(fd).st_blocks == 0, "nothing is taken before a worker needs it"
        assert not os.get_inheritable(fd), "only workers get it, and they are given it by number"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_cpu_has_no_host_tier() -> None:
    with open_host_memory_file(Settings(device="cpu", mem_pool_size=10_000_000)) as fd:
        assert fd is None
