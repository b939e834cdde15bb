"""The commands with a real model that comes from a package index."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def flash(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FLASH_STORAGE_PATH": str(store), "FLASH_SERVER_PORT": "0"}
    command = [sys.executable, "-m", "flashtensors.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )


def test_one_command_pulls_starts_and_answers(store: Path) -> None:
    try:
        answer = flash(store, "run", "smollm2:135m", "What is the capital of France?")
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout == "The capital of France is Paris.\n"
        assert "download" in answer.stderr
    finally:
        flash(store, "stop")


def test_doctor_asks_torch(store: Path) -> None:
    assert "torch import" in flash(store, "doctor", "--deep").stdout
