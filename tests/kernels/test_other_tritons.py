"""Kernels that are written for Hopper compile with every Triton that comes with a torch that this package takes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from .compile_apart import compile_apart

FOLDER = Path(__file__).parent
COMPILATIONS = {
    "attention": ("attention/compile_for_hopper.py", "128", "bf16"),
    "attention over fp8": ("attention/compile_for_hopper.py", "64", "fp8e4nv"),
    "decode": ("attention/compile_stream_for_hopper.py", "128", "ahead"),
    "split": ("attention/compile_split_for_hopper.py", "128", "fp8"),
    "products of few rows": ("compile_linear_for_hopper.py", "16", "1024"),
}


@pytest.fixture(scope="module", params=["3.7.1", "3.8.0", "3.9.0"])
def triton_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(f"triton-{request.param}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, f"triton=={request.param}"], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("compilation", COMPILATIONS.values(), ids=COMPILATIONS.keys())
def test_compiles(triton_folder: Path, compilation: tuple[str, str, str], tmp_path: Path) -> None:
    script, *arguments = compilation
    assert compile_apart(FOLDER / script, *arguments, cache=tmp_path, PYTHONPATH=str(triton_folder))
