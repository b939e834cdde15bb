"""Loads one folder of safetensors in several processes at the same time: `load_at_once.py FOLDER NUM_PROCESSES`.

Each process takes one way (in place, by a ring, by way of the host tier) and holds what it loaded against the file,
cut up here as the format's specification says. The exit status is the number of processes that failed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch  # before the fork: the processes share it

from flashtensors.checkpoint.safetensors import open_checkpoint
from flashtensors.memory.arena import Arena
from flashtensors.memory.host_pool import HostPool
from flashtensors.transfer.host_image import HostImage
from flashtensors.transfer.load_plan import make_copy_plan
from flashtensors.transfer.pipeline import load
from flashtensors.transfer.readers.automatic import AutomaticReader

CHUNK_BYTES = 64 * 1024


def read_as_specified(path: Path) -> dict[str, bytes]:
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: raw[start + begin : start + end] for name, (begin, end) in spans.items()}


def load_one_way(folder: Path, way: int) -> bool:
    """Whether what was loaded is what the files hold."""
    plan = make_copy_plan(open_checkpoint(folder).tensors.values())
    with Arena.allocate(plan.num_bytes) as arena, HostPool(16 * CHUNK_BYTES, chunk_bytes=CHUNK_BYTES) as pool:
        if way == 0:
            load(plan, arena, chunk_size=CHUNK_BYTES, open_reader=AutomaticReader)
        elif way == 1:
            load(plan, arena, pool=pool)
        else:
            with HostImage(plan, pool) as image:
                load(plan, arena, image=image)
        loaded = {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in plan.tensors(arena).items()}
    expected: dict[str, bytes] = {}
    for path in plan.files:
        expected |= read_as_specified(path)
    return loaded == expected


def main(folder: Path, num_processes: int) -> int:
    gate, opener = os.pipe()
    children: list[int] = []
    for index in range(num_processes):
        child = os.fork()
        if child == 0:
            os.close(opener)
            os.read(gate, 1)  # its end: all are there
            os._exit(0 if load_one_way(folder, index % 3) else 1)
        children.append(child)
    os.close(opener)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return sum(status != 0 for status in statuses)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
