"""What runner tests run under; `tests/conftest.py` has chosen Triton's interpreter where there is no CUDA device."""

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    """The interpreter computes with NumPy, which warns of what a GPU does silently."""
    item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
    for warning in ("overflow", "divide by zero", "invalid value"):
        item.add_marker(pytest.mark.filterwarnings(f"ignore:{warning} encountered:RuntimeWarning"))
