"""What a kernel is compiled for at a launch, as far as the host says it by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def launch_options(monkeypatch: pytest.MonkeyPatch, module: object, kernel: str, launch: Callable[[], Any]) -> Any:
    """Run `launch` with `kernel` of `module` replaced; returns the keyword arguments that it was launched with."""
    launches: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **options: launches.append(options)

    with monkeypatch.context() as patched:
        patched.setattr(module, kernel, Recorder())
        launch()
    return launches[-1]
