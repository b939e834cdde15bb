"""A worker without a model: answers the daemon's messages from a script."""

from __future__ import annotations

import asyncio
import dataclasses

from flashtensors.errors import CapacityError, FlashError, ModelNotFound, TransferError, WorkerError
from flashtensors.request import EngineRequest, SequenceDelta, TokenLogprobs
from flashtensors.server.generation import join_deltas
from flashtensors.worker.messages import (
    Abort,
    Command,
    Deltas,
    Event,
    Generate,
    KeepAlive,
    LoadFailed,
    LoadModel,
    LoadProgress,
    ModelLanded,
    ModelLoaded,
    ModelLoadFailed,
    ModelReady,
    ModelUnloaded,
    Ping,
    Pong,
    Prefetch,
    Prefetched,
    Register,
    RequestFailed,
    Shutdown,
    UnloadModel,
    WireError,
    WorkerReady,
)
from flashtensors.worker.stats import ModelStats, Stats

NUM_BLOCKS = 64


@dataclasses.dataclass
class FakeScript:
    """What the worker does; shared by every start of it."""

    answer: list[int] = dataclasses.field(default_factory=lambda: list(range(40, 60)))
    """Token ids of every answer; then comes `eos`, or the answer begins again."""
    eos: int | None = None
    token_delay_s: float = 0.0
    tokens_per_delta: int = 1
    load_delay_s: float = 0.0
    load_bytes_per_s: float | None = None
    """What the progress of loads says."""
    load_error: TransferError | None = None
    refuses_requests: bool = False
    hangs: bool = False
    """It lives and says nothing."""
    dies_after_tokens: int | None = None
    deadly_seed: int | None = None
    """Of requests of which it dies."""
    start_delay_s: float = 0.0
    num_starts: int = 0
    num_refused_starts: int = 0
    links: list[FakeLink] = dataclasses.field(default_factory=list)

    async def open_link(self) -> FakeLink:
        self.num_starts += 1
        await asyncio.sleep(self.start_delay_s)
        if self.num_starts <= self.num_refused_starts:
            raise WorkerError("the worker process could not be started")
        self.links.append(FakeLink(self))
        return self.links[-1]


class FakeLink:
    """One start of the fake worker."""

    def __init__(self, script: FakeScript) -> None:
        self.script = script
        self.commands: list[Command] = []
        self.loaded: dict[str, LoadModel] = {}
        self.registered: dict[str, Register] = {}
        self.running: dict[str, asyncio.Task[None]] = {}
        self.is_closed = False
        self._events: asyncio.Queue[Event | WorkerError] = asyncio.Queue()
        self._stopped: dict[tuple[str, int], str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._events.put_nowait(WorkerReady(pid=1, device="cpu", device_name="fake", total_bytes=1 << 30))

    def send(self, command: Command) -> None:
        self.commands.append(command)
        match command:
            case LoadModel():
                self._spawn(self._load(command))
            case Register(model=model):
                self.registered[model] = command
            case Prefetch(model=model):
                self._emit(Prefetched(model=model, host_bytes=1000, image_bytes=1000))
            case Ping():
                if not self.script.hangs:
                    self._emit(Pong())
            case UnloadModel(model=model):
                reason = "unload" if self.loaded.pop(model, None) else "not_loaded"
                self._emit(ModelUnloaded(model=model, reason=reason))
                self._emit_stats()
            case KeepAlive(model=model, keep_alive_s=keep_alive_s):
                if keep_alive_s == 0 and self.loaded.pop(model, None):
                    self._emit(ModelUnloaded(model=model, reason="keep_alive"))
            case Generate(request=request, keep_alive_s=keep_alive_s):
                self.running[request.request_id] = self._spawn(self._serve(request, keep_alive_s))
                self._emit_stats()
            case Abort(request_id=request_id, index=None):
                if (task := self.running.pop(request_id, None)) is not None:
                    task.cancel()
                    self._emit_stats()
            case Abort(request_id=request_id, index=int() as index, finish_reason=reason):
                self._stopped[request_id, index] = reason
            case Shutdown():
                self.die("told to")

    def kill(self) -> None:
        self.die("signal 9")

    def die(self, why: str = "exit code -9") -> None:
        for task in self.running.values():
            task.cancel()
        self._events.put_nowait(WorkerError(f"the worker process died ({why})"))

    async def receive(self) -> Event:
        event = await self._events.get()
        if isinstance(event, WorkerError):
            raise event
        return event

    async def close(self) -> None:
        self.is_closed = True
        for task in self._tasks:
            task.cancel()

    def _emit(self, event: Event) -> None:
        self._events.put_nowait(event)

    def _emit_stats(self) -> None:
        models = [
            ModelStats(
                model=model,
                num_running=len(self.running),
                num_waiting=0,
                kv_usage=len(self.running) / NUM_BLOCKS,
                weight_bytes=1000,
                kv_cache_bytes=500,
                expires_in_s=None if self.running else 300.0,
                is_pinned=command.is_pinned,
                num_preemptions=0,
                prefix_queries=10,
                prefix_hits=4,
            )
            for model, command in self.loaded.items()
        ]
        self._emit(Stats(models=models, loading=[], free_bytes=1 << 29))

    def _spawn(self, work) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, command: LoadModel) -> None:
        rate = self.script.load_bytes_per_s
        self._emit(LoadProgress(model=command.model, phase="read", done_bytes=500, total_bytes=1000, bytes_per_s=rate))
        await asyncio.sleep(self.script.load_delay_s)
        if self.script.load_error is not None:
            wire = WireError.of(self.script.load_error)
            self._emit(ModelLoadFailed(model=command.model, error=wire))
            self._emit(LoadFailed(model=command.model, error=wire))
            return
        was_loaded = command.model in self.loaded
        self.loaded[command.model] = command
        if not was_loaded:
            self._arrive(command.model)
        self._emit(
            ModelLoaded(
                model=command.model,
                weight_bytes=1000,
                kv_cache_bytes=500,
                num_kv_blocks=NUM_BLOCKS,
                block_size=16,
                max_model_len=128,
                dtype="float32",
                phase_seconds={"plan": 0.001, "read": 0.01, "prepare": 0.002},
                was_loaded=was_loaded,
            )
        )
        self._emit_stats()

    def _arrive(self, model: str) -> None:
        self._emit(
            ModelReady(
                model=model, weight_bytes=1000, kv_cache_bytes=500, max_model_len=128, dtype="float32", source="disk"
            )
        )
        self._emit(
            ModelLanded(
                model=model,
                source="disk",
                num_bytes=1000,
                disk_bytes=1000,
                host_bytes=0,
                reader="direct",
                total_s=0.013,
                phase_seconds={"queue": 0.001, "read": 0.01},
            )
        )

    async def _serve(self, request: EngineRequest, keep_alive_s: float | None) -> None:
        await self._generate(request)
        if keep_alive_s == 0 and self.loaded.pop(request.model, None):
            self._emit(ModelUnloaded(model=request.model, reason="keep_alive"))
            self._emit_stats()

    async def _generate(self, request: EngineRequest) -> None:
        if self.script.refuses_requests:
            error = CapacityError("512 requests wait already (max_queue); try again")
            self._fail(request, error)
            return
        if request.model not in self.loaded:
            if request.model not in self.registered:
                self._fail(request, ModelNotFound(f"{request.model} is not known"))
                return
            await asyncio.sleep(self.script.load_delay_s)
            if self.script.load_error is not None:
                self._emit(ModelLoadFailed(model=request.model, error=WireError.of(self.script.load_error)))
                self._fail(request, self.script.load_error)
                return
            if request.model not in self.loaded:
                self.loaded[request.model] = LoadModel(model=request.model, folder="")
                self._arrive(request.model)
        if self.script.deadly_seed is not None and request.sampling.seed == self.script.deadly_seed:
            self.die()
            return
        open_indices = set(range(request.sampling.n))
        position = 0
        while open_indices:
            await asyncio.sleep(self.script.token_delay_s)
            if position == self.script.dies_after_tokens:
                self.script.dies_after_tokens = None
                self.die()
                return
            deltas: list[SequenceDelta] = []
            for _ in range(self.script.tokens_per_delta):
                deltas += [self._delta(request, index, position) for index in sorted(open_indices)]
                open_indices -= {delta.index for delta in deltas if delta.finish_reason is not None}
                position += 1
            self._emit(Deltas(deltas=join_deltas(deltas)))
        self.running.pop(request.request_id, None)
        self._emit_stats()

    def _fail(self, request: EngineRequest, error: FlashError) -> None:
        self.running.pop(request.request_id, None)
        self._emit(RequestFailed(request_id=request.request_id, error=WireError.of(error)))

    def _delta(self, request: EngineRequest, index: int, position: int) -> SequenceDelta:
        if (reason := self._stopped.pop((request.request_id, index), None)) is not None:
            return SequenceDelta(request_id=request.request_id, index=index, token_ids=[], finish_reason=reason)
        sampling, answer = request.sampling, self.script.answer
        is_eos = position >= len(answer) and self.script.eos is not None
        token = self.script.eos if is_eos and self.script.eos is not None else answer[position % len(answer)]
        finish_reason, stop_token_id = None, None
        if is_eos or token in sampling.stop_token_ids:
            finish_reason, stop_token_id = "stop", token
        elif position + 1 >= min(sampling.max_tokens or 128, 128 - len(request.prompt_token_ids)):
            finish_reason = "length"
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = [TokenLogprobs(-0.25, [(token, -0.25), (104, -2.0), (105, -3.0)][: sampling.logprobs])]
        return SequenceDelta(
            request_id=request.request_id,
            index=index,
            token_ids=[token],
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            num_cached_tokens=3 if position == 0 else 0,
        )
