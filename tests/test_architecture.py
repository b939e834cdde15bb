"""Rules that keep the package readable and safe, held by reading its own source."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_PACKAGE = _ROOT / "flashtensors"
_MODULES = sorted(_PACKAGE.rglob("*.py"))

_MAX_MODULE_LINES = 500
_MAX_PLAIN_MODULE_LINES = 300
_LONG_MODULES: set[str] = set()
"""Modules between the two limits, each with a reason to be one module."""
_MAX_FUNCTION_LINES = 60

_TORCH_FREE = ["errors", "config", "request", "step", "checkpoint", "text", "kvcache", "engine", "residency"]
_TORCH_FREE += ["server", "cli", "worker.messages"]
_HEAVY_MODULES = ["torch", "triton", "transformers"]

_VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "helper"}
_BANNED_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
_BANNED_CALLS = {"eval", "exec", "__import__"}
_BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "set_default_dtype"}
_BANNED_QUALIFIED = {"torch.load", "torch.save", "yaml.load", "os.system"}


def _name(path: Path) -> str:
    return path.relative_to(_ROOT).as_posix()


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _is_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith(("triton.", "gluon.")) for decorator in function.decorator_list)


def _num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _repository_texts() -> Iterator[tuple[str, str]]:
    """Name and content of every text file of the project, this one aside."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=_ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = _ROOT / name
        if path.is_file() and path != Path(__file__):
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a picture


def test_modules_are_short() -> None:
    num_lines = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in _MODULES}
    assert {name: count for name, count in num_lines.items() if count > _MAX_MODULE_LINES} == {}
    assert {name for name, count in num_lines.items() if count > _MAX_PLAIN_MODULE_LINES} == _LONG_MODULES


def test_functions_are_short() -> None:
    long = {
        f"{_name(path)}:{function.name}": _num_lines(function)
        for path in _MODULES
        for function in _functions(_tree(path))
        if _num_lines(function) > _MAX_FUNCTION_LINES and not _is_triton(function)
    }
    assert long == {}


def test_no_module_has_a_vague_name() -> None:
    paths = [*_MODULES, *(_ROOT / "tests").rglob("*.py"), *(_ROOT / "benchmarks").rglob("*.py")]
    assert [_name(path) for path in paths if _VAGUE_NAMES & {path.stem, path.parent.name}] == []


def test_rooms_have_no_code_in_their_init() -> None:
    inits = [path for path in _MODULES if path.name == "__init__.py" and path.parent != _PACKAGE]
    assert [_name(path) for path in inits if [n for n in _tree(path).body if not isinstance(n, ast.Expr)]] == []


def test_test_folders_are_packages() -> None:
    folders = {path.parent for path in (_ROOT / "tests").rglob("test_*.py")}
    assert [_name(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def _banned(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.split(".")[0] in _BANNED_IMPORTS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in _BANNED_IMPORTS:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in _BANNED_CALLS:
                yield name
            case ast.Attribute(attr=name) if name in _BANNED_ATTRIBUTES or ast.unparse(node) in _BANNED_QUALIFIED:
                yield ast.unparse(node)
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                yield "shell=True"
            case ast.FunctionDef(name="__del__"):
                yield "__del__"
            case ast.ExceptHandler(type=None):
                yield "bare except"
            case ast.Constant(value=str(text)) if "trust_remote_code" in text:
                yield "trust_remote_code"
            case ast.keyword(arg="trust_remote_code") | ast.arg(arg="trust_remote_code"):
                yield "trust_remote_code"


@pytest.mark.parametrize("path", _MODULES, ids=_name)
def test_nothing_banned_is_used(path: Path) -> None:
    assert list(_banned(_tree(path))) == []


def test_banned_constructs_are_seen() -> None:
    source = """
import pickle, os
from marshal import loads
eval("1"); torch.load("x"); socket.recv_pyobj(); f(trust_remote_code=True); run("x", shell=True)
class A:
    def __del__(self): pass
try: pass
except: pass
"""
    seen = ["pickle", "marshal", "eval", "torch.load", "socket.recv_pyobj", "trust_remote_code", "shell=True"]
    assert sorted(_banned(ast.parse(source))) == sorted([*seen, "__del__", "bare except"])


def _modules_of(room: str) -> list[str]:
    path = _PACKAGE / room.replace(".", "/")
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    return [_name(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in files]


def _heavy_modules_after(imports: list[str]) -> str:
    """What a fresh interpreter says after importing these: the first import that brings a heavy module."""
    program = (
        "import importlib, sys\n"
        f"for name in {imports!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [module for module in {_HEAVY_MODULES!r} if module in sys.modules]\n"
        "    if heavy: sys.exit(f'{name} brings {heavy}')\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=_ROOT, timeout=120)
    return finished.stderr.strip()


def test_rooms_that_decide_never_import_torch() -> None:
    assert _heavy_modules_after([module for room in _TORCH_FREE for module in _modules_of(room)]) == ""


def test_importing_the_package_is_light() -> None:
    assert _heavy_modules_after(["flashtensors"]) == ""


def test_heavy_imports_are_seen() -> None:
    assert "brings ['torch']" in _heavy_modules_after(["torch"])


def test_public_names_exist_and_are_documented() -> None:
    package = importlib.import_module("flashtensors")
    assert package.__all__
    undocumented = [
        name for name in package.__all__ if not inspect.getdoc(getattr(package, name)) and name != "__version__"
    ]
    assert undocumented == []


def test_project_speaks_of_itself_alone() -> None:
    elsewhere = re.compile(r"(?<![\w.~])/(?:work|root)/|/tmp/venv|\bissues? #?\d+\b", re.IGNORECASE)
    found = [f"{name}: {match[0]}" for name, text in _repository_texts() for match in elsewhere.finditer(text)]
    assert found == []


@pytest.mark.parametrize("name", ["scripts/setup", "scripts/check", "scripts/test", "scripts/demo", ".ci/run"])
def test_scripts_run_and_parse(name: str) -> None:
    path = _ROOT / name
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""
