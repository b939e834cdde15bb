"""How many tokens a second can the daemon stream before its own Python is the limit?

The daemon's HTTP side runs in this process, before a worker process that sends tokens on a ZeroMQ socket at a set rate
(one message a step, each answer's tokens coalesced as the engine does) and a process of clients that read the streams
raw. The offered rate and the CPU seconds that this process spends give tokens per CPU second: the rate at which one
core is full. Correctness first: every client must read every token of its answer. Turning the same ids into text, and
doing nothing else, is the limit in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from record import report

from flashtensors.checkpoint.catalog import Catalog
from flashtensors.checkpoint.pull import pull
from flashtensors.config import Settings
from flashtensors.request import SequenceDelta
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
from flashtensors.text.stream import TextStream
from flashtensors.text.tokenizer import Tokenizer
from flashtensors.worker.messages import Command, Deltas, Event, Generate, LoadModel, ModelLoaded, WorkerReady

TOKEN_IDS = list(range(40, 240))
"""Answers repeat these."""


class Link:
    """The supervisor's end of the socket; notes when the last of the streams was asked for."""

    def __init__(self, endpoint: str, num_streams: int) -> None:
        self._num_unasked = num_streams
        self.begun_s = self.begun_cpu_s = 0.0
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(endpoint)
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Event)

    def send(self, command: Command) -> None:
        """As the protocol says."""
        self._num_unasked -= isinstance(command, Generate)
        if self._num_unasked == 0:
            self._num_unasked = -1
            self.begun_s, self.begun_cpu_s = time.perf_counter(), time.process_time()
        self._socket.send(self._encoder.encode(command))

    async def receive(self) -> Event:
        """As the protocol says."""
        return self._decoder.decode(await self._socket.recv())

    async def close(self) -> None:
        """As the protocol says."""
        self._socket.close(0)
        self._context.term()


def work(endpoint: str, num_streams: int, num_tokens: int, rate: float, tokens_per_delta: int) -> None:
    """The worker: once all streams are there, one message for all every `tokens_per_delta` steps of the rate."""
    context = zmq.Context()
    connection = context.socket(zmq.PAIR)
    connection.set_hwm(0)
    connection.connect(endpoint)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Command)

    def emit(event: Event) -> None:
        connection.send(encoder.encode(event))

    emit(WorkerReady(pid=1, device="cpu", device_name="none", total_bytes=1 << 30))
    request_ids: list[str] = []
    while len(request_ids) < num_streams:
        command = decoder.decode(connection.recv())
        if isinstance(command, LoadModel):
            emit(loaded(command.model))
        elif isinstance(command, Generate):
            request_ids.append(command.request.request_id)
    started_s = time.perf_counter()
    for first in range(0, num_tokens, tokens_per_delta):
        count = min(tokens_per_delta, num_tokens - first)
        token_ids = [TOKEN_IDS[(first + index) % len(TOKEN_IDS)] for index in range(count)]
        reason = "length" if first + count == num_tokens else None
        emit(Deltas(deltas=[delta(request_id, token_ids, reason) for request_id in request_ids]))
        time.sleep(max(0.0, started_s + (first + count) * num_streams / rate - time.perf_counter()))
    connection.recv()  # until the other end goes


def loaded(model: str) -> ModelLoaded:
    return ModelLoaded(
        model=model,
        weight_bytes=1,
        kv_cache_bytes=1,
        num_kv_blocks=1,
        block_size=16,
        max_model_len=4096,
        dtype="float32",
        phase_seconds={},
    )


def delta(request_id: str, token_ids: list[int], reason: str | None) -> SequenceDelta:
    return SequenceDelta(request_id=request_id, index=0, token_ids=token_ids, finish_reason=reason)


def read_streams(port: int, num_streams: int, num_tokens: int) -> None:
    """The clients: read all streams to their end; print how many bytes, and how much text came from the first."""
    body = json.dumps({"model": "tiny", "prompt": "x", "stream": True, "max_tokens": num_tokens, "ignore_eos": True})
    fields = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    head = "\r\n".join([*fields, f"content-length: {len(body)}"])
    selector = selectors.DefaultSelector()
    for number in range(num_streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        selector.register(connection, selectors.EVENT_READ, bytearray() if number == 0 else None)
    num_bytes, first = 0, b""
    tails: dict[Any, bytes] = {}
    while selector.get_map():
        for key, _ in selector.select():
            connection: socket.socket = key.fileobj  # pyright: ignore
            data = connection.recv(1 << 20)
            num_bytes += len(data)
            if key.data is not None:
                key.data.extend(data)
            tails[connection] = (tails.get(connection, b"") + data)[-32:]
            if not data or b"[DONE]" in tails[connection] or b"\r\n0\r\n\r\n" in tails[connection]:
                first = first or bytes(key.data or b"")
                selector.unregister(connection)
                connection.close()
    lines = [line[6:] for line in first.split(b"\n") if line.startswith(b"data: {")]
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    print(json.dumps({"num_bytes": num_bytes, "num_chunks": len(lines), "text": text}))


async def serve(settings: Settings, args: argparse.Namespace, tokens_per_delta: int) -> dict[str, Any]:
    """One measurement."""
    endpoint = f"ipc://{settings.store}/worker"
    metrics = Metrics()

    link = Link(endpoint, args.streams)

    async def open_link() -> Link:
        return link

    supervisor = Supervisor(open_link, metrics)
    await supervisor.start()
    counts = [str(args.streams), str(args.tokens)]
    worker = subprocess.Popen(
        [sys.executable, __file__, "worker", endpoint, *counts, str(args.rate), str(tokens_per_delta)]
    )
    try:
        models = ModelManager(settings, Catalog(settings.store), supervisor, metrics)
        files = FileStore(settings.store / "files")
        batches = make_batch_jobs(settings, files, models, metrics)
        async with Pulls(models.catalog, settings) as pulls:
            context = ServerContext(
                settings=settings,
                models=models,
                metrics=metrics,
                pulls=pulls,
                drain=Drain(),
                files=files,
                batches=batches,
            )
            with bind("127.0.0.1", 0) as listener:
                port = listener.getsockname()[1]
                async with HttpServer(build_app(context), listener, max_header_bytes=32 * 1024):
                    return await measure(["clients", str(port), *counts], link, args)
    finally:
        worker.kill()
        worker.wait()
        await supervisor.stop()


async def measure(role: list[str], link: Link, args: argparse.Namespace) -> dict[str, Any]:
    clients = await asyncio.create_subprocess_exec(sys.executable, __file__, *role, stdout=subprocess.PIPE)
    output, _ = await clients.communicate()
    wall_s, cpu_s = time.perf_counter() - link.begun_s, time.process_time() - link.begun_cpu_s
    num_tokens = args.streams * args.tokens
    return json.loads(output) | {
        "tokens_per_s": round(num_tokens / wall_s),
        "tokens_per_cpu_s": round(num_tokens / cpu_s),
        "cpu_s": round(cpu_s, 3),
        "wall_s": round(wall_s, 3),
    }


def text_alone(tokenizer: Tokenizer, num_tokens: int, num_streams: int) -> tuple[str, dict[str, Any]]:
    """The text of an answer, and what making it costs when nothing else is done."""
    token_ids = [TOKEN_IDS[index % len(TOKEN_IDS)] for index in range(num_tokens)]
    cpu_s, text = time.process_time(), ""
    for _ in range(num_streams):
        stream = TextStream(tokenizer)
        text = stream.push(token_ids) + stream.flush()
    cpu_s = time.process_time() - cpu_s
    return text, {"case": "text alone", "tokens_per_cpu_s": round(num_tokens * num_streams / cpu_s)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--rate", type=float, default=200_000, help="tokens a second that the worker offers")
    parser.add_argument("--tokens-per-delta", type=int, nargs="+", default=[1, 8, 32])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tiny"
        write_tiny_checkpoint(source, tiny_config("llama", max_position_embeddings=4096))
        write_tiny_tokenizer(source)
        settings = Settings(storage_path=f"{folder}/store")
        pull(Catalog(settings.store), str(source))
        expected, limit = text_alone(Tokenizer.from_folder(source), args.tokens, args.streams)
        rows = [limit]
        for tokens_per_delta in args.tokens_per_delta:
            row = asyncio.run(serve(settings, args, tokens_per_delta))
            if row.pop("text") != expected:
                raise SystemExit("a client did not read the whole answer")
            rows.append({"case": "streams", "tokens_per_delta": tokens_per_delta} | row)
    report("stream", rows, num_streams=args.streams, num_tokens=args.tokens, offered_tokens_per_s=args.rate)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]), int(sys.argv[6]))
    elif sys.argv[1:2] == ["clients"]:
        read_streams(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
