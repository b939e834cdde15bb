"""Render a conversation with the Jinja template that came with a model."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import TemplateError as JinjaTemplateError

from ..errors import TemplateError
from .render_budget import MAX_VALUE_SIZE, RenderBudget
from .template_guard import GuardedEnvironment

MAX_TEMPLATE_SIZE = 2**20
"""Most characters in a template."""

RENDER_CPU_TIME_S = 2.0
"""CPU time that one rendering may take; an ordinary one takes a few milliseconds."""


_FILE_NAME = "<template>"  # what jinja calls a template that came from a string


class ChatTemplate:
    """One compiled chat template. Rendering is thread-safe, and bounded in time and size.

    What users write is only ever data to it: braces in a message stay braces.

    Args:
        source: The template, as transformers' `apply_chat_template` understands it.
        where: The file it came from, for messages.
        cpu_time_s: CPU time that one rendering may take.

    Raises:
        TemplateError: The template is too large or does not parse.
    """

    def __init__(self, source: str, *, where: str, cpu_time_s: float = RENDER_CPU_TIME_S) -> None:
        self._where = where
        self._cpu_time_s = cpu_time_s
        self._environment = GuardedEnvironment()
        if len(source) > MAX_TEMPLATE_SIZE:
            raise TemplateError(
                f"{where}: the chat template has {len(source)} characters, but at most {MAX_TEMPLATE_SIZE} are read"
            )
        try:
            self._template: Template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise TemplateError(f"{where}: line {error.lineno} of the chat template: {error.message}") from error
        except RecursionError as error:
            raise TemplateError(f"{where}: the chat template is nested too deeply to parse") from error

    def render(self, variables: Mapping[str, object]) -> str:
        """The text for these variables (`messages`, `tools`, `add_generation_prompt`, …).

        Raises:
            TemplateError: The template failed, refused the messages, ran too long, built too much, or tried to leave
                the sandbox.
        """
        budget = RenderBudget(self._cpu_time_s)
        token = self._environment.budget.set(budget)
        try:
            return _concatenate(self._template.generate(**variables))
        except Exception as error:  # a stranger's program: it may raise anything
            raise TemplateError(self._describe(error)) from error
        finally:
            self._environment.budget.reset(token)

    def _describe(self, error: Exception) -> str:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _FILE_NAME]
        place = (
            f"{self._where}: line {lines[-1]} of the chat template" if lines else f"{self._where}: the chat template"
        )
        match error:
            case SecurityError():
                return f"{place} was refused: {error}"
            case JinjaTemplateError() if not isinstance(error, UndefinedError):
                return f"{place} refused this conversation: {error.message}"
            case _:
                return f"{place} failed with {type(error).__name__}: {error}"


def _concatenate(chunks: Iterable[str]) -> str:
    parts: list[str] = []
    size = 0
    for chunk in chunks:
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_VALUE_SIZE:
            raise SecurityError(f"it prints more than {MAX_VALUE_SIZE} characters")
    return "".join(parts)
