"""Makes wheels, whole and hostile, for tests."""

import base64
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def record_line(name: str, data: bytes) -> str:
    """A line of RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def write_wheel(
    folder: Path,
    distribution: str,
    files: Mapping[str, bytes],
    *,
    version: str = "1.0",
    requires: Sequence[str] = (),
    record: Mapping[str, str] | None = None,
    extra_entries: Sequence[tuple[zipfile.ZipInfo, bytes]] = (),
) -> Path:
    """Write a pure Python wheel.

    Args:
        folder: Where; made if absent.
        distribution: With underscores.
        files: Path in the wheel to content.
        version: The package's version.
        requires: Values of `Requires-Dist`.
        record: RECORD lines that replace the right ones, by member.
        extra_entries: Members that RECORD does not name.
    """
    dist_info = f"{distribution}-{version}.dist-info"
    requirements = "".join(f"Requires-Dist: {text}\n" for text in requires)
    members = {
        **files,
        f"{dist_info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: {version}\n{requirements}\nText\n"
        ).encode(),
        f"{dist_info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = {name: record_line(name, data) for name, data in members.items()} | dict(record or {})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{distribution}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        for info, data in extra_entries:
            archive.writestr(info, data)
        archive.writestr(f"{dist_info}/RECORD", "".join(lines.values()) + f"{dist_info}/RECORD,,\n")
    return path
