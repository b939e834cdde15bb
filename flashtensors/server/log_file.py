"""Keeps the daemon's log bounded while it and its workers write to it."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path

_log = logging.getLogger(__name__)

MAX_LOG_BYTES = 16 * 1024**2
"""Size from which the log is set aside; the one set aside before is dropped."""
CHECK_EVERY_S = 60.0


def rotate_log(path: Path, max_bytes: int = MAX_LOG_BYTES) -> bool:
    """Copy a log that is larger than `max_bytes` to `<name>.1` and begin it anew; whether it was.

    The file itself stays: several processes append to it, and each goes on at its new end. What is written between
    the copy and the cut is lost.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
        shutil.copyfile(path, path.with_name(path.name + ".1"))
        os.truncate(path, 0)
    except FileNotFoundError:
        return False  # nobody keeps a log: the daemon runs in a terminal
    except OSError as error:
        _log.warning("%s cannot be rotated: %s", path, error)
        return False
    return True


async def keep_log_bounded(path: Path) -> None:
    """Rotate the log for as long as this runs."""
    while True:
        await asyncio.to_thread(rotate_log, path)
        await asyncio.sleep(CHECK_EVERY_S)
