"""Without a CUDA device, kernels run in Triton's interpreter; it must be chosen before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_itemcollected(item: pytest.Item) -> None:
    """NumPy, which the interpreter computes with, warns of loop bounds in arrays and of infinities that are meant."""
    item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
    item.add_marker(
        pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
    )
