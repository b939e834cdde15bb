"""Names of Gluon that are not the same in all of Triton 3.6 to 3.9."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Load a box of a tensor into shared memory: descriptor, where it begins, barrier, destination."""

wait_for_partition = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Wait for all threads of a partition."""
