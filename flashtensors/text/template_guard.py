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

from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any, cast

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import pass_context, pass_environment
from jinja2.visitor import NodeTransformer

from .bounded_filters import (
    BOUNDED_FILTERS,
    CHAT_GLOBALS,
    HasBudget,
    admit_format,
    admit_percent,
    admit_replace,
)
from .render_budget import RenderBudget

# fmt: off
_FILTERS = {
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
}
_REFUSED_METHODS = {
    "center", "encode", "expandtabs", "format_map", "ljust", "maketrans", "rjust", "to_bytes", "translate", "zfill",
}
# fmt: on
_GLOBALS = {"cycler", "joiner", "range"}


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
        filters = {name: function for name, function in self.filters.items() if name in _FILTERS}
        filters |= BOUNDED_FILTERS | {"_concatenated": _concatenated, "_literal": _literal}
        self.filters = {name: self._guarded(function) for name, function in filters.items()}
        self.filters["_counted"] = _counted
        self.globals = {name: value for name, value in self.globals.items() if name in _GLOBALS} | CHAT_GLOBALS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Instrument().visit(super()._parse(source, name, filename))

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps jinja's marks, such as `pass_environment`
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.budget.get().built(function(*args, **kwargs))

        return run

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuse methods that make large values of small ones."""
        return attr not in _REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `obj` as the sandbox does, with its result weighed."""
        budget = self.budget.get()
        method = getattr(obj, "__wrapped__", obj)  # jinja wraps str.format
        receiver = getattr(method, "__self__", None)
        if isinstance(receiver, str) and method.__name__ == "replace":
            admit_replace(budget, receiver, *args[:2])
        elif isinstance(receiver, str) and method.__name__ == "join":
            args = (budget.gather(args[0], len(receiver)),)
        elif isinstance(receiver, str) and method is not obj:
            admit_format(budget, receiver, [*args, *kwargs.values()])
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
                admit_percent(budget, left, right)
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


@pass_context
def _print_value(context: Context, value: object) -> str:
    budget = cast(HasBudget, context.environment).budget.get()
    return budget.built(budget.text(value))


@pass_environment
def _counted(environment: HasBudget, items: Iterable[Any]) -> Iterator[Any]:
    budget = environment.budget.get()
    for item in items:
        budget.tick()
        yield item


@pass_environment
def _concatenated(environment: HasBudget, items: list[Any]) -> str:
    return "".join(environment.budget.get().gather(items, 0))


def _literal(value: Any) -> Any:
    return value
