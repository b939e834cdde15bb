"""How loads end: those of models that were unloaded are cancelled, and each that fails is told of once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ..errors import FlashError
from ..residency.actions import Action, AnswerLoad, RefuseRequest
from .messages import Event, ModelLoadFailed, WireError


class LoadEnds:
    """Cancels loads that nobody wants any more, and tells of those that failed.

    Args:
        cancel: Makes the load of a model end soon.
        emit: Called with every event.
    """

    def __init__(self, cancel: Callable[[str], None], emit: Callable[[Event], None]) -> None:
        self._cancel = cancel
        self._emit = emit
        self._is_unloaded: dict[str, bool] = {}
        """By the models whose loads run."""
        self._num_requests: Counter[str] = Counter()
        """By the models that they run on."""

    def begin(self, model: str) -> None:
        """A load begins."""
        self._is_unloaded[model] = False

    def land(self, model: str) -> None:
        """A load has ended well."""
        del self._is_unloaded[model]

    def fail(self, model: str, error: FlashError) -> None:
        """A load has ended in an error, which is no failure where it was cancelled."""
        if not self._is_unwanted(model):
            self._tell(model, error)
        del self._is_unloaded[model]

    def note_refusals(self, actions: Iterable[Action], *, explained: str | None) -> None:
        """Who is refused waited for a load that failed; only those who waited for `explained` are refused otherwise."""
        waited = (each for each in actions if isinstance(each, AnswerLoad | RefuseRequest))
        errors = {each.model: each.error for each in waited if each.error is not None and each.model != explained}
        for model, error in errors.items():
            self._tell(model, error)

    def unload(self, model: str) -> None:
        """Cancel the load of `model`, where one runs, at once or when the last request on the model has ended."""
        if model in self._is_unloaded:
            self._is_unloaded[model] = True
            self._cancel_unwanted(model)

    def start_request(self, model: str) -> None:
        """A request runs on `model`."""
        self._num_requests[model] += 1

    def end_request(self, model: str) -> None:
        """A request that ran on `model` has ended."""
        self._num_requests[model] -= 1
        self._cancel_unwanted(model)

    def _is_unwanted(self, model: str) -> bool:
        return self._is_unloaded.get(model, False) and not self._num_requests[model]

    def _cancel_unwanted(self, model: str) -> None:
        if self._is_unwanted(model):
            self._cancel(model)

    def _tell(self, model: str, error: FlashError) -> None:
        self._emit(ModelLoadFailed(model=model, error=WireError.of(error)))
