"""The examples run as they are, on the model that they name."""

import subprocess
import sys
from pathlib import Path

import pytest

_EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart.py", "stream.py"])
def test_an_example_knows_the_capital_of_france(name: str) -> None:
    finished = subprocess.run(
        [sys.executable, _EXAMPLES / name], capture_output=True, text=True, timeout=280, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "Paris" in finished.stdout
