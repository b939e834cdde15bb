"""Files of this machine as a source."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import PullError
from .inventory import is_model_file
from .names import LocalReference

_SHARD = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


def find_local_files(reference: LocalReference) -> list[Path]:
    """Files of a local model: all shards of a GGUF file, or the model files of a folder.

    Raises:
        PullError: Nothing is there, or it is no model; the message says what was looked for.
    """
    path = Path(reference.path)
    try:
        if path.is_dir():
            return sorted(entry for entry in path.iterdir() if entry.is_file() and is_model_file(entry.name))
        if path.is_file() and path.suffix.lower() == ".gguf":
            return list_shards(path)
    except OSError as error:
        raise PullError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
    problem = "is neither a folder nor a .gguf file" if path.exists() else "does not exist"
    raise PullError(f"{path} {problem}; give a folder with config.json and safetensors files, or a .gguf file")


def list_shards(path: Path) -> list[Path]:
    """All files of a GGUF model of which `path` is one; raises `PullError` naming the first that is missing."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    shards = [path.with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    for shard in shards:
        if not shard.is_file():
            raise PullError(f"{shard}: this shard is missing; put all {count} files into one folder")
    return shards


def find_newest_change_s(reference: LocalReference) -> float:
    """When a local model last changed, in Unix seconds; raises as `find_local_files`."""
    paths = [Path(reference.path), *find_local_files(reference)]
    try:
        return max(max(status.st_mtime, status.st_ctime) for status in (path.stat() for path in paths))
    except OSError as error:
        raise PullError(f"{reference.path}: changed while it was read; pull it again") from error
