"""The tree that the docstring draws is the tree that the code has."""

import re
from collections import defaultdict

import pytest

from flashtensors import errors
from flashtensors.errors import FlashError, error_classes

_LINE = re.compile(r"^ {4}(?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+) +(?P<status>\d{3}) +(?P<code>[a-z_]+)")


def drawn_tree() -> dict[str, tuple[str | None, int, str]]:
    """Name to (parent, HTTP status, code), read from the docstring."""
    tree: dict[str, tuple[str | None, int, str]] = {}
    ancestors: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.match(line)
        if match:
            depth = len(match["branch"]) // 4
            parent = ancestors[depth - 1] if depth else None
            tree[match["name"]] = (parent, int(match["status"]), match["code"])
            ancestors[depth:] = [match["name"]]
    return tree


def all_errors() -> list[type[FlashError]]:
    return [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FlashError)]


def test_docstring_draws_the_real_tree() -> None:
    real = {
        error.__name__: (None if error is FlashError else error.__bases__[0].__name__, error.http_status, error.code)
        for error in all_errors()
    }
    assert drawn_tree() == real


def test_no_two_errors_share_a_code() -> None:
    names = defaultdict(list)
    for error in all_errors():
        names[error.code].append(error.__name__)
    assert {code: found for code, found in names.items() if len(found) > 1} == {}


def test_codes_find_their_classes() -> None:
    assert error_classes() == {error.code: error for error in all_errors()}


@pytest.mark.parametrize("error", all_errors())
def test_an_error_crosses_a_process_boundary_by_code_message_and_param(error: type[FlashError]) -> None:
    sent = error("what, where and what to do", param="top_p")
    rebuilt = error_classes()[sent.code](sent.message, param=sent.param)
    assert type(rebuilt) is error
    assert (str(rebuilt), rebuilt.message, rebuilt.param) == ("what, where and what to do", sent.message, "top_p")
    assert 400 <= rebuilt.http_status < 600


def test_param_is_absent_unless_given() -> None:
    assert FlashError("x").param is None
