"""What the daemon does with models before any request names them."""

import asyncio

import pytest

from flashtensors.worker.messages import LoadModel

from .conftest import StartDaemon


def test_named_models_are_loaded_at_start_and_a_wrong_name_is_logged(
    start_fake_daemon: StartDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = start_fake_daemon(preload="nobody, tiny,")
    asyncio.run_coroutine_threadsafe(daemon.context.models.preload(), daemon.loop).result(20)
    assert [command.model for command in daemon.link.commands if isinstance(command, LoadModel)] == ["tiny"]
    assert "cannot preload nobody" in caplog.text
    with daemon.client() as http:
        assert [model["name"] for model in http.get("/api/ps").json()["models"]] == ["tiny"]
