"""Counts what must not happen while a known model is swapped in: captures, compilations, allocations, pins, opens."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from flashtensors.memory.cuda_driver import CudaMemoryDriver
from flashtensors.memory.pinning import CudaPinning


class Counters:
    """Counts from its making on, in all threads; there is one in a process."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.compiled: list[str] = []
        """Names of kernels that were compiled or read from the disk's cache."""
        self._watch(torch.cuda.CUDAGraph, "capture_begin", "captures")
        self._watch(CudaMemoryDriver, "create", "device handles made")
        self._watch(CudaMemoryDriver, "reserve", "address ranges reserved")
        self._watch(CudaPinning, "register", "host ranges registered")
        sys.addaudithook(self._audit)
        if torch.cuda.is_available():
            import triton

            triton.knobs.runtime.jit_post_compile_hook = self._note_compilation

    def read(self) -> dict[str, int]:
        """Counts so far."""
        counts = {name: self._counts[name] for name in ("captures", "device handles made", "address ranges reserved")}
        counts["kernels compiled or loaded"] = len(self.compiled)
        counts["host ranges registered"] = self._counts["host ranges registered"]
        counts["weight files opened"] = self._counts["weight files opened"]
        if torch.cuda.is_available():
            counts["device allocations"] = int(torch.cuda.memory_stats().get("num_device_alloc", 0))
            counts["pinned allocations"] = int(torch.cuda.host_memory_stats().get("num_host_alloc", 0))
        return counts

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """What has happened since `before`, a reading."""
        return {name: count - before[name] for name, count in self.read().items()}

    def _watch(self, owner: type, method: str, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def count(*args: Any, **options: Any) -> Any:
            self._counts[name] += 1
            return original(*args, **options)

        setattr(owner, method, count)

    def _note_compilation(self, *args: Any, fn: Any = None, **details: Any) -> None:
        self.compiled.append(getattr(fn, "name", "?"))

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]).endswith(".safetensors"):
            self._counts["weight files opened"] += 1
