"""Every op that launches a kernel has a definition in torch, which tests run and docs/kernels.md lists beside it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).parents[2]
_KERNELS = _ROOT / "flashtensors" / "kernels"
_LAUNCHES = re.compile(r"(?:launch|attend)_\w+")
_STEP_ROWS = "step_rows.py"
"""The engine's slots: its ops write state that only the engine has, and its tests hold them to Python."""


class Op(NamedTuple):
    """A door."""

    module: Path
    function: ast.FunctionDef

    @property
    def name(self) -> str:
        return self.function.name

    @property
    def reference(self) -> str:
        return f"{self.name}_reference"


def _ops_of(module: Path, tree: ast.Module) -> Iterator[Op]:
    """Public functions that import a launch as they run, or call a private one that does."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    launching = {name for name, function in functions.items() if _imports_launch(function)}
    private = {name for name in functions if name.startswith("_")}
    for _ in functions:
        launching |= {name for name, function in functions.items() if launching & private & _names_in(function)}
    yield from (Op(module, functions[name]) for name in sorted(launching - private))


def _imports_launch(function: ast.FunctionDef) -> bool:
    imports = [node for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
    return any(_LAUNCHES.fullmatch(alias.name) for node in imports for alias in node.names)


def _names_in(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


_OPS = [
    op
    for module in sorted(_KERNELS.rglob("*.py"))
    if module.name != _STEP_ROWS
    for op in _ops_of(module, _parse(module))
]
_TESTED = {name for test in (_ROOT / "tests" / "kernels").rglob("test_*.py") for name in _names_in(_parse(test))}


@pytest.fixture(params=_OPS, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


def test_ops_are_found() -> None:
    names = {op.name for op in _OPS}
    assert {"ragged_attention", "rope_append", "sample_rows", "linear", "scatter_tokens"} <= names
    assert len(names) == len(_OPS)
    assert not [name for name in names if name.endswith("_reference")]


def test_an_op_has_a_reference_beside_it_with_its_arguments(op: Op) -> None:
    beside = {op.module, op.module.parent / "reference.py"}
    functions = {
        f.name: f for path in beside if path.exists() for f in _parse(path).body if isinstance(f, ast.FunctionDef)
    }
    assert op.reference in functions, f"{op.module.name} has no {op.reference}"
    taken, known = (
        [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
        for function in (functions[op.reference], op.function)
    )
    assert [name for name in taken if name not in known] == []


def test_a_reference_is_run_by_tests(op: Op) -> None:
    is_what_a_cpu_runs = op.reference in _names_in(op.function) and op.name in _TESTED
    assert op.reference in _TESTED or is_what_a_cpu_runs


def test_an_op_is_listed_with_its_reference(op: Op) -> None:
    rows = [
        line for line in (_ROOT / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"
    ]
    module = op.module.relative_to(_ROOT / "flashtensors").as_posix()
    assert [row for row in rows if f"`{op.name}`" in row and f"`{module}`" in row], f"docs/kernels.md lacks {op.name}"
