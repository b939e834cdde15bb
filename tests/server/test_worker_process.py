"""A real worker process at the end of a line."""

import asyncio
import os
import signal
import tempfile
from pathlib import Path

import pytest

from flashtensors.config import Settings
from flashtensors.errors import WorkerError
from flashtensors.server.worker_process import WorkerProcess
from flashtensors.worker.messages import Ping, Pong, WorkerReady

from .test_host_memory_file import needs_memory_files


@needs_memory_files
def test_a_worker_inherits_the_memory_file_answers_pings_and_can_be_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def scenario(fd: int) -> None:
        link = await WorkerProcess.start(Settings(device="cpu"), fd)
        try:
            async with asyncio.timeout(60):
                assert isinstance(await link.receive(), WorkerReady)
                assert list(tmp_path.iterdir()) == [], "a daemon that is killed leaves no folder"
                link.send(Ping())
                while not isinstance(await link.receive(), Pong):
                    pass  # it reports what it holds first
                link.kill()
                with pytest.raises(WorkerError, match="signal 9"):
                    await link.receive()
        finally:
            await link.close()

    fd = os.memfd_create("test")
    try:
        asyncio.run(scenario(fd))
    finally:
        os.close(fd)


async def listen_to_the_end(link: WorkerProcess) -> None:
    while True:
        await link.receive()


def test_a_file_that_became_shorter_is_named_as_the_cause(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> str:
        link = await WorkerProcess.start(Settings(device="cpu"))
        try:
            async with asyncio.timeout(60):
                ready = await link.receive()
                assert isinstance(ready, WorkerReady)
                os.kill(ready.pid, signal.SIGBUS)  # what the kernel does to who reads a page beyond a file's end
                with pytest.raises(WorkerError) as caught:
                    await listen_to_the_end(link)
                return caught.value.message
        finally:
            await link.close()

    message = asyncio.run(scenario())
    assert f"signal {signal.SIGBUS:d}: a model's file became shorter" in message
    assert "flash verify MODEL" in message
    log = capfd.readouterr().err
    assert "Fatal Python error: Bus error" in log
    assert "process.py" in log, "it shows where the worker was"
