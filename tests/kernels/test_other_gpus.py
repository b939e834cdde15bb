"""Kernels compile for every GPU that has them, and take no more shared memory than it gives a program."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from .compile_apart import compile_apart

SCRIPT = Path(__file__).parent / "compile_for_gpu.py"
GPUS = {"8.0": (108, 163 << 10), "8.9": (128, 99 << 10), "9.0": (132, 227 << 10), "10.0": (148, 227 << 10)}
"""Multiprocessors and bytes of shared memory of a program, by capability."""

Compilations = dict[str, Future[dict[str, int]]]


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilations]:
    """Shared memory of each kernel for each GPU; they are compiled side by side."""
    with ThreadPoolExecutor() as pool:
        yield {
            capability: pool.submit(
                compile_apart, SCRIPT, capability, *sizes, cache=tmp_path_factory.mktemp(f"sm-{capability}")
            )
            for capability, sizes in GPUS.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("capability", GPUS)
def test_kernels_compile_and_fit_shared_memory(capability: str, compilations: Compilations) -> None:
    found, (_, shared_bytes) = compilations[capability].result(), GPUS[capability]
    assert len(found) > 40
    assert {place: size for place, size in found.items() if size > shared_bytes} == {}
