"""Binaries lie where they should, and are compiled once."""

import os
import subprocess
import sys

import pytest

from flashtensors.kernels import binaries
from flashtensors.kernels.binaries import folder_for, is_warmed, list_binaries, note_warmed, warm


def test_folders_tell_versions_and_devices_apart(tmp_path):
    folders = {
        folder_for(tmp_path, triton_version=version, capability=capability)
        for version in ("3.6.0", "3.7.0")
        for capability in ((9, 0), (10, 0))
    }
    assert len(folders) == 4
    assert all(folder.parent == tmp_path for folder in folders)


def test_nothing_compiled_is_nothing_listed(tmp_path):
    assert list_binaries(tmp_path / "nowhere") == []


def test_binaries_are_counted(tmp_path):
    kernel = tmp_path / "triton-3.6.0-sm90" / "KEY"
    kernel.mkdir(parents=True)
    (kernel / "a.cubin").write_bytes(b"12345")
    (kernel / "a.json").write_bytes(b"{}")
    (found,) = list_binaries(tmp_path)
    assert (found.name, found.num_kernels, found.num_bytes) == ("triton-3.6.0-sm90", 1, 7)


def test_an_error_of_a_call_is_raised_when_all_have_run(tmp_path):
    ran = []

    def fail():
        raise RuntimeError("no such shape")

    with pytest.raises(RuntimeError, match="no such shape"):
        warm([fail, lambda: ran.append(1)], tmp_path, num_threads=1)
    assert ran == [1]


def test_listing_needs_neither_torch_nor_triton():
    code = (
        "import sys, pathlib; from flashtensors.kernels.binaries import list_binaries;"
        "list_binaries(pathlib.Path('x'));"
        "sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_what_was_warmed_is_known_until_a_source_changes(tmp_path, monkeypatch):
    assert not is_warmed(tmp_path, b"a model")
    note_warmed(tmp_path, b"a model")
    note_warmed(tmp_path, b"a model")
    assert is_warmed(tmp_path, b"a model")
    assert not is_warmed(tmp_path, b"another")
    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    source = package / "kernels" / "binaries.py"
    monkeypatch.setattr(binaries, "__file__", str(source))
    source.write_text("1")
    note_warmed(tmp_path, b"a model")
    assert is_warmed(tmp_path, b"a model")
    source.write_text("10")
    assert not is_warmed(tmp_path, b"a model")
