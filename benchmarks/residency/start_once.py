"""A process from its start to its first token: `start_once.py FOLDER STARTED_UNIX_S`; prints seconds by phase."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

STARTED_S = float(sys.argv[2])


def since_start() -> float:
    return time.time() - STARTED_S


def main(folder: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    from flashtensors.config import Settings
    from flashtensors.worker.messages import LoadModel, ModelLanded, ModelLoaded

    from worker_thread import WorkerThread  # isort: skip

    importlib.import_module("triton")  # what the kernels need is imported too
    marks = {"imports": since_start()}
    settings = Settings(storage_path=f"{folder}/../store", mem_pool_size=2 * 1024**3, kv_cache_size=4 * 10**9)
    with WorkerThread(settings) as thread:
        marks["worker"] = since_start()
        thread.send(LoadModel(model="m", folder=folder))
        answer = thread.ask("m", list(range(100, 228)), 4)
        thread.wait(answer)
        marks["first token"] = answer.token_times_s[0] - time.perf_counter() + since_start()
        loaded, landed = thread.of(ModelLoaded), thread.of(ModelLanded)
        phases = landed[0].phase_seconds if landed else loaded[0].phase_seconds
    print(json.dumps({"marks": marks, "phase_seconds": phases, "device": torch.cuda.get_device_name()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
