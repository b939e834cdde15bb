"""A daemon's HTTP side in this process, in front of a scripted worker, and models small enough to make here."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.config import Settings
from flashtensors.server.app import build_app
from flashtensors.server.context import ServerContext
from flashtensors.server.drain import Drain
from flashtensors.server.files import FileStore
from flashtensors.server.http_server import HttpServer
from flashtensors.server.listener import bind
from flashtensors.server.metrics import Metrics
from flashtensors.server.models import ModelManager
from flashtensors.server.openai.batch_lines import make_batch_jobs
from flashtensors.server.pulls import Pulls
from flashtensors.server.supervisor import Supervisor
from flashtensors.testing.checkpoints import tiny_config, write_tiny_checkpoint, write_tiny_tokenizer
from flashtensors.text.tokenizer import Tokenizer

from .fake_worker import FakeLink, FakeScript


class FakeDaemon:
    """The HTTP side of a daemon on a thread of its own."""

    def __init__(self, settings: Settings, script: FakeScript) -> None:
        self.settings, self.script = settings, script
        self.context: ServerContext
        self.loop: asyncio.AbstractEventLoop
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    @property
    def link(self) -> FakeLink:
        """The worker of now."""
        return self.script.links[-1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=20, headers=headers)

    def __enter__(self) -> "FakeDaemon":
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        metrics = Metrics()
        supervisor = Supervisor(self.script.open_link, metrics, back_off_s=0.01)
        catalog = Catalog(self.settings.store)
        await supervisor.start()
        models = ModelManager(self.settings, catalog, supervisor, metrics)
        files = FileStore(self.settings.store / "files")
        batches = make_batch_jobs(self.settings, files, models, metrics)
        async with Pulls(catalog, self.settings) as pulls, batches:
            self.context = ServerContext(
                settings=self.settings,
                models=models,
                metrics=metrics,
                pulls=pulls,
                drain=Drain(),
                files=files,
                batches=batches,
            )
            with bind("127.0.0.1", 0) as listener:
                self.port = listener.getsockname()[1]
                async with HttpServer(build_app(self.context), listener, max_header_bytes=32 * 1024):
                    self._started.set()
                    await self._stop.wait()
        await supervisor.stop()


ANSWER = "Hello world! One two three, naïve café 🙂. The end of the text."


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `tiny`, which chats, and `plain`, which has no chat template."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny", "plain"):
        write_tiny_checkpoint(folder / name, tiny_config("llama"))
        write_tiny_tokenizer(folder / name)
    path = folder / "plain" / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    del fields["chat_template"]
    path.write_text(json.dumps(fields))
    catalog = Catalog(folder / "store")
    for name in ("tiny", "plain"):
        pull(catalog, str(folder / name))
    return folder / "store"


StartDaemon = Callable[..., FakeDaemon]


def make_script(tiny_store: Path) -> FakeScript:
    """The answer is `ANSWER`."""
    record = Catalog(tiny_store).get("tiny")
    return FakeScript(answer=Tokenizer.from_folder(Path(record.folder)).encode(ANSWER), eos=2)


@pytest.fixture(scope="session")
def shared_daemon(tiny_store: Path) -> Iterator[FakeDaemon]:
    """One for the tests that leave nothing behind but loaded models."""
    with FakeDaemon(Settings(storage_path=str(tiny_store)), make_script(tiny_store)) as daemon:
        yield daemon


@pytest.fixture
def clean_daemon(shared_daemon: FakeDaemon, tiny_store: Path) -> FakeDaemon:
    """The shared daemon with no model loaded and a script as new."""
    fresh, script = make_script(tiny_store), shared_daemon.script
    kept = {"links": script.links, "num_starts": script.num_starts}
    vars(script).update({**vars(fresh), **kept})
    with shared_daemon.client() as http:
        while http.get("/ready").status_code != 200:
            pass  # the test before killed the worker
        for model in http.get("/api/ps").json()["models"]:
            http.post("/api/generate", json={"model": model["name"], "keep_alive": 0}).raise_for_status()
    return shared_daemon


@pytest.fixture
def start_fake_daemon(tiny_store: Path) -> Iterator[StartDaemon]:
    """Start the HTTP side with settings of the test's choice."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(
            FakeDaemon(Settings(storage_path=str(tiny_store), **settings), make_script(tiny_store))
        )


@pytest.fixture
def daemon(start_fake_daemon: StartDaemon) -> FakeDaemon:
    return start_fake_daemon()


@pytest.fixture
def script(daemon: FakeDaemon) -> FakeScript:
    return daemon.script
