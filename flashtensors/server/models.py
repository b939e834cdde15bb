"""From the name in a request to a model that is on the device: catalog record, tokenizer, load."""

from __future__ import annotations

import asyncio
import collections
import logging
from pathlib import Path
from typing import Any

import msgspec

from ..checkpoint.architecture import ModelConfig, read_model_config
from ..checkpoint.catalog import Catalog, ModelRecord
from ..config import Settings
from ..errors import CapacityError, ContextTooLong, FlashError, RequestError
from ..request import SamplingParams
from ..text.tokenizer import Tokenizer
from ..worker.messages import KeepAlive, LoadModel, ModelLoaded, Prefetched, Register
from .metrics import Metrics
from .supervisor import Supervisor

_log = logging.getLogger(__name__)

MAX_OPEN_TOKENIZERS = 32
"""Tokenizers kept in memory; the one used longest ago goes first."""
FOR_EVER_S = 100 * 365 * 86400.0
"""A keep-alive longer than this means for ever."""


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the catalog with what requests to it need before any weight is loaded."""

    record: ModelRecord
    config: ModelConfig
    tokenizer: Tokenizer
    max_model_len: int
    """Most tokens in a sequence, as far as known without the KV cache's size."""

    @property
    def name(self) -> str:
        """Name in the catalog: what the worker and the metrics call it."""
        return self.record.name

    def check_prompt(self, token_ids: list[int], *, param: str) -> None:
        """Refuse an empty prompt, ids that the model lacks, and prompts that leave no room for an answer."""
        if not token_ids:
            raise RequestError(f"{param} has no tokens; give at least one", param=param)
        if len(token_ids) >= self.max_model_len:
            raise ContextTooLong(
                f"{param} has {len(token_ids)} tokens, but {self.name} holds {self.max_model_len} with its answer; "
                "shorten it",
                param=param,
            )
        self._check_ids(token_ids, param)

    async def encode_chat(
        self, messages: list[dict[str, object]], variables: dict[str, Any], *, param: str = "messages"
    ) -> list[int]:
        """Checked token ids of a conversation, which came as `param`; rendering and encoding run in a thread."""
        token_ids = await asyncio.to_thread(self.tokenizer.encode_chat, messages, **variables)
        self.check_prompt(token_ids, param=param)
        return token_ids

    def check_sampling(self, sampling: SamplingParams) -> None:
        """Refuse token ids outside the model's vocabulary."""
        self._check_ids(list(sampling.logit_bias), "logit_bias")
        self._check_ids(sampling.stop_token_ids, "stop_token_ids")

    def _check_ids(self, token_ids: list[int], param: str) -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.config.vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.config.vocab_size)
            raise RequestError(
                f"{param} holds token id {wrong}, but {self.name} knows 0 to {self.config.vocab_size - 1}", param=param
            )


class ModelManager:
    """Opens models of the catalog and keeps at most one load of each under way.

    Args:
        settings: `max_model_len`, `max_queue` and the keep-alive come from here.
        catalog: The models on disk.
        supervisor: The worker that holds them when they are loaded.
        metrics: Where waiting is counted.
    """

    def __init__(self, settings: Settings, catalog: Catalog, supervisor: Supervisor, metrics: Metrics) -> None:
        self.catalog = catalog
        self.supervisor = supervisor
        self._settings = settings
        self._metrics = metrics
        self._opened: collections.OrderedDict[tuple[str, str], asyncio.Task[ServedModel]] = collections.OrderedDict()
        self._registered: dict[str, str] = {}
        self._num_waiting: collections.Counter[str] = collections.Counter()

    async def open(self, name: str) -> ServedModel:
        """The model called `name`, with its tokenizer; raises `ModelNotFound` that names near matches."""
        record = await asyncio.to_thread(self.catalog.get, name)
        key = (record.name, _version(record))
        task = self._opened.get(key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(_open, record, self._settings.max_model_len))
            self._opened[key] = task
            task.add_done_callback(lambda done: self._drop_failed(key, done))
            while len(self._opened) > MAX_OPEN_TOKENIZERS:
                self._opened.popitem(last=False)
        self._opened.move_to_end(key)
        return await asyncio.shield(task)

    def _drop_failed(self, key: tuple[str, str], task: asyncio.Task[ServedModel]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._opened.pop(key, None)

    def check_room(self, num_prompts: int, n: int) -> None:
        """Refuse prompts of one request that can never all wait for a model: to try again would not help."""
        max_queue = self._settings.max_queue
        if (num_prompts - 1) * n >= max_queue:
            raise RequestError(
                f"{num_prompts} prompts with n={n} make {num_prompts * n} answers, but about {max_queue} can wait for "
                "a model (max_queue); send several requests",
                param="prompt",
            )

    def register(self, model: ServedModel) -> None:
        """Let the worker bring the model to the device by itself when a request asks for it.

        A model that was pulled again since is forgotten first, so that nothing of its old files is used.
        """
        record = model.record
        version = _version(record)
        known = self._registered.get(model.name)
        if known == version:
            return
        if known is not None:
            self.supervisor.forget_model(model.name)
        self._registered[model.name] = version
        self.supervisor.register(
            Register(model=model.name, folder=record.folder, max_model_len=self._settings.max_model_len)
        )

    async def ensure_loaded(
        self, model: ServedModel, *, keep_alive_s: float | None = None, is_pinned: bool = False
    ) -> ModelLoaded:
        """Wait until all of the model is on the device. Requests need not: the worker loads registered models itself.

        Raises:
            CapacityError: `max_queue` callers wait for this load already.
            FlashError: The load failed.
        """
        self.register(model)
        if self._num_waiting[model.name] >= self._settings.max_queue:
            raise CapacityError(
                f"{self._settings.max_queue} requests wait for {model.name} to load already (max_queue); try again"
            )
        command = LoadModel(
            model=model.name,
            folder=model.record.folder,
            max_model_len=self._settings.max_model_len,
            keep_alive_s=bounded(keep_alive_s),
            is_pinned=is_pinned,
        )
        self._num_waiting[model.name] += 1
        try:
            with self._metrics.requests_loading.labels(model.name).track_inprogress():
                return await self.supervisor.load(command)
        finally:
            self._num_waiting[model.name] -= 1

    async def prefetch(self, model: ServedModel) -> Prefetched:
        """Wait until the model is in host memory, or as much of it as there is room for."""
        self.register(model)
        return await self.supervisor.prefetch(model.name)

    async def preload(self) -> None:
        """Load the models that the settings name; what goes wrong with one is logged, and the others are loaded."""
        for name in filter(None, map(str.strip, self._settings.preload.split(","))):
            try:
                await self.ensure_loaded(await self.open(name))
            except FlashError as error:
                _log.error("cannot preload %s: %s", name, error.message)

    def set_keep_alive(self, name: str, keep_alive_s: float) -> None:
        """Change how long a loaded model stays when idle; nothing happens when it is not loaded."""
        self.supervisor.send(KeepAlive(model=name, keep_alive_s=bounded(keep_alive_s) or 0.0))

    async def unload(self, name: str) -> None:
        """Take the model off the device; waits for its running requests."""
        record = await asyncio.to_thread(self.catalog.get, name)
        await self.supervisor.unload(record.name)

    async def delete(self, name: str) -> None:
        """Take the model off the device, out of host memory and out of the store."""
        record = await asyncio.to_thread(self.catalog.get, name)
        if record.name in self.supervisor.models.loaded:
            await self.supervisor.unload(record.name)
        if self._registered.pop(record.name, None) is not None:
            self.supervisor.forget_model(record.name)
        await asyncio.to_thread(self.catalog.remove, record.name)

    def state_of(self, record: ModelRecord) -> str:
        """`on_disk`, `loading` or `ready`."""
        models = self.supervisor.models
        if record.name in models.loaded:
            return "ready"
        is_loading = models.stats is not None and record.name in models.stats.loading
        return "loading" if is_loading or self._num_waiting[record.name] else "on_disk"


def _version(record: ModelRecord) -> str:
    """What changes when a model is pulled again."""
    return f"{record.folder}@{record.created_unix_s}"


def _open(record: ModelRecord, max_model_len: int | None) -> ServedModel:
    folder = Path(record.folder)
    config = read_model_config(folder)
    limit = config.max_position_embeddings
    return ServedModel(
        record=record,
        config=config,
        tokenizer=Tokenizer.from_folder(folder),
        max_model_len=limit if max_model_len is None else min(limit, max_model_len),
    )


def bounded(keep_alive_s: float | None) -> float | None:
    """A keep-alive as the worker takes it: one beyond `FOR_EVER_S` never ends."""
    return -1.0 if keep_alive_s is not None and keep_alive_s > FOR_EVER_S else keep_alive_s
