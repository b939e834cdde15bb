"""The models that a worker may load by itself: where their files are, and how to compute with them."""

from __future__ import annotations

from ..errors import ConfigError, ModelNotFound
from .messages import LoadModel, Register


class KnownModels:
    """How each registered model is loaded, by name."""

    def __init__(self) -> None:
        self._known: dict[str, LoadModel] = {}

    def __contains__(self, model: str) -> bool:
        return model in self._known

    def get(self, model: str) -> LoadModel:
        """How to load `model`; raises `ModelNotFound` when nobody has said."""
        known = self._known.get(model)
        if known is None:
            raise ModelNotFound(f"{model} is not known to this worker; register or load it first", param="model")
        return known

    def register(self, command: Register | LoadModel) -> bool:
        """Know a model; whether it was known under other values."""
        known = self._known.get(command.model)
        self._known[command.model] = wanted = LoadModel(
            model=command.model, folder=command.folder, dtype=command.dtype, max_model_len=command.max_model_len
        )
        return known not in (None, wanted)

    def forget(self, model: str) -> None:
        """Know a model no more; an unknown one is ignored."""
        self._known.pop(model, None)

    def check(self, command: LoadModel) -> None:
        """Raise `ConfigError` when a load asks for a model in another way than it is known."""
        known = self.get(command.model)
        conflict = "folder" if command.folder != known.folder else None
        for name in ("dtype", "max_model_len"):
            value = getattr(command, name)
            if value is not None and value != getattr(known, name):
                conflict = conflict or name
        if conflict is not None:
            raise ConfigError(f"{command.model} is loaded with another {conflict}; unload it first", param=conflict)
