"""A Jinja environment for templates written by strangers: no way out, and no way to spin or swell without end.

Jinja's sandbox keeps a template from reaching Python's internals, but not from running for ever or filling memory. So:

- Time: every loop iteration, call, filter and growing operator looks at the CPU time of the rendering thread.
- Size: every value that a template builds (operators, filters, calls, literals, output) is weighed, and what multiplies
  its operands, such as `*`, `replace` or `indent`, before it runs.
- Surface: only the filters that chat templates use; no string methods that pad; no large formatting widths.

Between two looks at the clock a template thus does a bounded amount of work on values of bounded size. A thread with a
time-out would not stop it, since a thread cannot be ended; a process per rendering would, at a hundred times the cost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaTemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_indent, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_environment
from jinja2.visitor import NodeTransformer

from .render_budget import RenderBudget

# fmt: off
_FILTERS = {
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
}
_PADDING_METHODS = {
    "center", "encode", "expandtabs", "format_map", "ljust", "maketrans", "rjust", "to_bytes", "translate", "zfill",
}
# fmt: on
_GLOBALS = {"cycler", "joiner", "range"}
_LARGE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(\d{4,}|\{)")
_LARGE_PERCENT = re.compile(r"%(\([^)]*\))?[-#0 +\d.]*(\d{4,}|\*)")
_MAX_JSON_INDENT = 16


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs chat templates as transformers does, within the budget in `budget`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        # Without the optimiser nothing of the template runs while it is compiled.
        extensions = [_GenerationTag, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False, finalize=_print_value
        )
        self.budget: ContextVar[RenderBudget] = ContextVar("budget")
        """The budget of the rendering that runs in this context; set it before rendering."""
        own: dict[str, Callable[..., Any]] = {
            "indent": _indent,
            "join": _join,
            "replace": _replace,
            "tojson": _to_json,
            "_concatenated": _concatenated,
            "_literal": _literal,
        }
        known = {name: function for name, function in self.filters.items() if name in _FILTERS}
        self.filters = {name: self._guarded(function) for name, function in (known | own).items()}
        self.filters["_counted"] = _counted
        self.globals = {name: value for name, value in self.globals.items() if name in _GLOBALS}
        self.globals.update(
            dict=_make_dict, namespace=_Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Instrument().visit(super()._parse(source, name, filename))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps jinja's marks, such as `pass_environment`
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.budget.get().built(function(*args, **kwargs))

        return run

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuse methods that make large values of small ones."""
        return attr not in _PADDING_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `obj` as the sandbox does, with its result weighed."""
        budget = self.budget.get()
        method = getattr(obj, "__wrapped__", obj)  # jinja wraps str.format
        receiver = getattr(method, "__self__", None)
        if isinstance(receiver, str):
            match method.__name__:
                case "replace":
                    _admit_replace(budget, receiver, *args[:2])
                case "join":
                    args = (budget.gather(args[0], len(receiver)),)
                case "format":
                    _admit_format(budget, receiver, _LARGE_FORMAT, receiver.count("{"), [*args, *kwargs.values()])
                case "format_map":
                    raise SecurityError("format_map is refused in chat templates")
        return budget.built(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator whose result may be much larger than its operands."""
        budget = self.budget.get()
        match operator, left, right:
            case "**", int(), int():
                budget.admit_power(left, right)
            case "*", str() | bytes() | list() | tuple(), int():
                budget.admit(budget.weigh(left) * right)
            case "*", int(), str() | bytes() | list() | tuple():
                budget.admit(budget.weigh(right) * left)
            case "+", _, _:
                budget.admit(budget.weigh(left) + budget.weigh(right))
            case "%", str(), _:
                _admit_format(budget, left, _LARGE_PERCENT, left.count("%"), right)
        return budget.built(super().call_binop(context, operator, left, right))


class _Instrument(NodeTransformer):
    """Puts the guards where Jinja offers no hook: loops, `~`, literals and plain text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filtered(items, "_concatenated")

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_literal")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_literal")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_literal") if node.ctx == "load" else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno, environment=node.environment)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class _GenerationTag(Extension):
    """`{% generation %}` marks an answer for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012, jinja reads it from the class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace, without names that begin with an underscore and without its content when printed."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_public(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: its name begins with an underscore")


def _budget_of(environment: Any) -> RenderBudget:
    return environment.budget.get()


@pass_context
def _print_value(context: Context, value: object) -> str:
    budget = _budget_of(context.environment)
    return budget.built(budget.text(value))


@pass_environment
def _counted(environment: GuardedEnvironment, items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget_of(environment)
    for item in items:
        budget.tick()
        yield item


def _literal(value: Any) -> Any:
    return value


@pass_environment
def _concatenated(environment: GuardedEnvironment, items: list[Any]) -> str:
    return "".join(_budget_of(environment).gather(items, 0))


@pass_environment
def _join(
    environment: GuardedEnvironment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return str(d).join(_budget_of(environment).gather(items, len(str(d))))


@pass_environment
def _replace(environment: GuardedEnvironment, s: object, old: str, new: str, count: int | None = None) -> str:
    _admit_replace(_budget_of(environment), str(s), old, new)
    return str(s).replace(old, new, -1 if count is None else count)


@pass_environment
def _indent(
    environment: GuardedEnvironment, s: str, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    size = len(width) if isinstance(width, str) else width
    _budget_of(environment).admit(len(s) + (len(s.splitlines()) + 1) * size)
    return do_indent(s, width, first, blank)


def _to_json(
    x: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    size = max([len(text) for text in (indent, *(separators or ())) if isinstance(text, str)], default=0)
    if max(size, indent if isinstance(indent, int) else 0) > _MAX_JSON_INDENT:
        raise SecurityError(f"tojson takes an indent and separators of at most {_MAX_JSON_INDENT} characters")
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _admit_replace(budget: RenderBudget, text: str, old: str, new: str) -> None:
    budget.admit(len(text) + text.count(old) * len(new))


def _admit_format(budget: RenderBudget, text: str, large: re.Pattern[str], num_fields: int, values: object) -> None:
    if large.search(text):
        raise SecurityError(f"format {text[:80]!r} has a width of four or more digits, or one that is computed")
    budget.admit(len(text) + num_fields * (1000 + budget.weigh(values)))


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: object) -> None:
    raise JinjaTemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
