"""Serve many language models from one GPU, or from a CPU.

    import flashtensors as ft

    ft.register_model("smollm2:135m")
    with ft.load_model("smollm2:135m") as llm:
        print(llm.generate("The capital of France is", ft.SamplingParams(temperature=0))[0].outputs[0].text)

Names are imported when they are first used, so `import flashtensors` is light and brings no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import flash
    from .config import Settings
    from .errors import FlashError
    from .llm import LLM
    from .request import CompletionOutput, RequestOutput, SamplingParams
    from .sdk import (
        cleanup_gpu,
        configure,
        get_config,
        get_model_info,
        list_models,
        load_model,
        register_model,
        remove_model,
        shutdown_server,
        unload_model,
    )

__all__ = [
    "LLM",
    "CompletionOutput",
    "FlashError",
    "RequestOutput",
    "SamplingParams",
    "Settings",
    "cleanup_gpu",
    "configure",
    "flash",
    "get_config",
    "get_model_info",
    "list_models",
    "load_model",
    "register_model",
    "remove_model",
    "shutdown_server",
    "unload_model",
]

_HOMES = {
    "LLM": "llm",
    "CompletionOutput": "request",
    "FlashError": "errors",
    "RequestOutput": "request",
    "SamplingParams": "request",
    "Settings": "config",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        metadata = importlib.import_module("importlib.metadata")
        return metadata.version(__name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "flash":
        return importlib.import_module(".flash", __name__)
    return getattr(importlib.import_module(f".{_HOMES.get(name, 'sdk')}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
