"""Loads by one library, in a process of its own: `load_once.py LIBRARY DEVICE NUM_LOADS FOLDER…`.

Prints GB/s of every load of every folder, `[[first, second, …], …]`. Each clock starts when the library is imported and
the device's context is there, and ends when every tensor is on the device and stays there. What a library keeps ready
for many loads may be ready: the pool of `flashtensors`. In `flashtensors, no pool` page-locked memory is made within
the load, as every peer does.
"""

from __future__ import annotations

import glob
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

POOL_BYTES = 2 * 1024**3
CHUNK_BYTES = 16 * 1024**2
NUM_THREADS = 16

Load = Callable[[], list[torch.Tensor]]


def paths_of(folder: str) -> list[str]:
    return sorted(glob.glob(f"{folder}/*.safetensors"))


def prepare_safetensors(folder: str, device: str, stack: ExitStack) -> Load:
    from safetensors import safe_open

    def load() -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        for path in paths_of(folder):
            with safe_open(path, "pt", device=device) as file:
                names = file.keys()  # not iterable itself
                tensors += [file.get_tensor(name) for name in names]
        return tensors

    return load


def prepare_fastsafetensors(folder: str, device: str, stack: ExitStack) -> Load:
    from fastsafetensors import fastsafe_open

    def load() -> list[torch.Tensor]:
        tensors: list[torch.Tensor] = []
        for path in paths_of(folder):
            with fastsafe_open([path], nogds=True, device=device) as file:
                names = file.keys()
                tensors += [file.get_tensor(name).clone() for name in names]  # its memory goes with the file
        return tensors

    return load


def prepare_runai(folder: str, device: str, stack: ExitStack) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> list[torch.Tensor]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths_of(folder))
            return [tensor.to(device) for _, tensor in streamer.get_tensors()]

    return load


def prepare_instanttensor(folder: str, device: str, stack: ExitStack) -> Load:
    import instanttensor

    def load() -> list[torch.Tensor]:
        with instanttensor.safe_open(paths_of(folder), framework="pt", device=torch.device(device)) as file:
            return [tensor for _, tensor in file.tensors()]

    return load


def prepare_flashtensors(folder: str, device: str, stack: ExitStack, *, has_pool: bool = True) -> Load:
    from flashtensors.checkpoint.safetensors import open_checkpoint
    from flashtensors.memory.arena import Arena
    from flashtensors.memory.host_pool import HostPool
    from flashtensors.memory.pinning import find_pinning
    from flashtensors.transfer.load_plan import make_copy_plan
    from flashtensors.transfer.pipeline import load as load_plan

    options: dict[str, Any] = {"num_threads": NUM_THREADS, "chunk_size": CHUNK_BYTES}
    if has_pool and device != "cpu":
        pinning = find_pinning(torch.device(device))
        options["pool"] = pool = stack.enter_context(HostPool(POOL_BYTES, chunk_bytes=CHUNK_BYTES, pinning=pinning))
        pool.wait()

    def load() -> list[torch.Tensor]:
        plan = make_copy_plan(open_checkpoint(Path(folder)).tensors.values())
        arena = stack.enter_context(Arena.allocate(plan.num_bytes, device))
        load_plan(plan, arena, **options)
        return list(plan.tensors(arena).values())

    return load


LIBRARIES: dict[str, Callable[[str, str, ExitStack], Load]] = {
    "flashtensors": prepare_flashtensors,
    "flashtensors, no pool": lambda *args: prepare_flashtensors(*args, has_pool=False),
    "safetensors": prepare_safetensors,
    "fastsafetensors": prepare_fastsafetensors,
    "run:ai streamer": prepare_runai,
    "InstantTensor": prepare_instanttensor,
}
"""What makes a load ready, by the name of the library."""


def timed(load: Load, device: str) -> float:
    """GB/s of one load, whose tensors are dropped."""
    started_s = time.perf_counter()
    tensors = load()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started_s
    return sum(tensor.nbytes for tensor in tensors) / seconds / 1e9


def main(library: str, device: str, num_loads: str, *folders: str) -> None:
    torch.zeros(1, device=device)
    rates: list[list[float]] = []
    for folder in folders:
        of_folder: list[float] = []
        for _ in range(int(num_loads)):
            with ExitStack() as stack:
                of_folder.append(timed(LIBRARIES[library](folder, device, stack), device))
            if device != "cpu":
                torch.cuda.empty_cache()
        rates.append(of_folder)
    print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
