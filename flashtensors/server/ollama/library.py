"""What is in the store and on the device: `/api/{tags,ps,show,delete,load,version}`."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncGenerator
from pathlib import Path

from starlette.responses import Response

from ...checkpoint.catalog import ModelRecord
from ...errors import CheckpointError
from ...text.tokenizer_files import read_tokenizer_files
from ...worker.messages import LoadProgress, ModelLoaded, ModelReady
from ...worker.stats import ModelStats, Stats, Whereabouts
from ..bodies import parse_body
from ..context import Call
from ..models import ServedModel
from ..responses import NDJSON, json_response, open_stream
from ..supervisor import Supervisor
from .schema import LoadRequest, NamedRequest
from .timings import nanoseconds, timestamp

PROGRESS_EVERY_S = 0.1
"""Between two reports on a load."""
_FOR_EVER = "2318-01-01T00:00:00Z"
"""How Ollama's clients read "never"."""


async def list_tags(call: Call) -> Response:
    """Every model in the store."""
    records = await asyncio.to_thread(call.server.models.catalog.list)
    return json_response({"models": [_tag(record) for record in records]})


async def list_running(call: Call) -> Response:
    """Every model on the device; the fields from `dtype` on, and all but `models`, are extensions.

    `host` lists models of which something is in host memory but that are not on the device.
    """
    supervisor, models = call.server.models.supervisor, call.server.models.supervisor.models
    stats = models.stats
    running = {} if stats is None else {model.model: model for model in stats.models}
    places = {} if stats is None else {place.model: place for place in stats.whereabouts}
    listed: list[dict[str, object]] = []
    for name, ready in models.loaded.items():
        record = await asyncio.to_thread(call.server.models.catalog.find, name)
        if record is not None:
            shown = _running(ready, running.get(name), models.stats_unix_s)
            listed.append(_tag(record) | shown | _place(places.get(name)))
    loading = [
        {"model": model, "phase": progress.phase} | _progress(progress) for model, progress in models.progress.items()
    ]
    host = [{"model": name} | _place(place) for name, place in places.items() if name not in models.loaded]
    return json_response({"models": listed, "host": host, "loading": loading, "worker": _worker(supervisor, stats)})


async def show(call: Call) -> Response:
    """One model's particulars; `flashtensors` holds what Ollama has no place for."""
    body = parse_body(call.body, NamedRequest, {"system": ("",), "template": ("",), "options": ({},)})
    record = await asyncio.to_thread(call.server.models.catalog.get, body.model_name)
    template = await asyncio.to_thread(_find_template, Path(record.folder))
    return json_response(
        {
            "modelfile": "",
            "parameters": "",
            "template": template or "",
            "modified_at": timestamp(record.created_unix_s),
            "details": _details(record),
            "model_info": {
                "general.architecture": record.model_type,
                "general.parameter_count": record.num_parameters,
                f"{record.model_type}.context_length": record.max_position_embeddings,
            },
            "capabilities": ["completion"],
            "flashtensors": record,
        }
    )


async def delete(call: Call) -> Response:
    """Take a model off the device and out of the store."""
    body = parse_body(call.body, NamedRequest, {})
    await call.server.models.delete(body.model_name)
    return json_response({"status": "success"})


async def load(call: Call) -> Response:
    """Extension: bring a model to the device, or to host memory, and report how far it is."""
    body = parse_body(call.body, LoadRequest, {})
    model = await call.server.models.open(body.model)
    if body.stream:
        return await open_stream(_load_progress(call, body, model), NDJSON)
    return json_response(await _bring(call, body, model))


async def _bring(call: Call, body: LoadRequest, model: ServedModel) -> dict[str, object]:
    models = call.server.models
    if body.tier == "host":
        prefetched = await models.prefetch(model)
        return {"status": "success", "host_bytes": prefetched.host_bytes, "image_bytes": prefetched.image_bytes}
    return _loaded(await models.ensure_loaded(model, keep_alive_s=body.keep_alive_s, is_pinned=body.is_pinned))


async def version(call: Call) -> Response:
    """The package's version."""
    return json_response({"version": importlib.metadata.version("flashtensors")})


async def _load_progress(call: Call, body: LoadRequest, model: ServedModel) -> AsyncGenerator[object]:
    task = asyncio.create_task(_bring(call, body, model))
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=PROGRESS_EVERY_S)
            progress = call.server.models.supervisor.models.progress.get(model.name)
            if not task.done() and progress is not None:
                yield {"status": progress.phase} | _progress(progress)
        yield task.result()
    finally:
        task.cancel()


def _progress(progress: LoadProgress) -> dict[str, object]:
    """How far a load is; its rate is null until there is one."""
    return {
        "completed": progress.done_bytes,
        "total": progress.total_bytes,
        "bytes_per_s": progress.bytes_per_s,
    }


def _loaded(loaded: ModelLoaded) -> dict[str, object]:
    return {
        "status": "success",
        "size": loaded.weight_bytes,
        "kv_cache_bytes": loaded.kv_cache_bytes,
        "context_length": loaded.max_model_len,
        "was_loaded": loaded.was_loaded,
        "load_duration": nanoseconds(sum(loaded.phase_seconds.values())),
        "phase_seconds": loaded.phase_seconds,
    }


def _tag(record: ModelRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "model": record.name,
        "modified_at": timestamp(record.created_unix_s),
        "size": record.num_bytes,
        "digest": _digest(record),
        "details": _details(record),
    }


def _digest(record: ModelRecord) -> str:
    """What identifies the weights: the digest of the largest file."""
    largest = max(record.files, key=lambda file: file.num_bytes, default=None)
    return "" if largest is None else f"sha256:{largest.sha256}"


def _details(record: ModelRecord) -> dict[str, object]:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": record.model_type,
        "families": [record.model_type],
        "parameter_size": _short_count(record.num_parameters),
        "quantization_level": record.quantization or record.dtype,
    }


def _short_count(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _worker(supervisor: Supervisor, stats: Stats | None) -> dict[str, object]:
    worker: dict[str, object] = {"state": supervisor.state, "num_restarts": supervisor.num_restarts}
    ready = supervisor.ready
    if ready is not None:
        worker |= {"pid": ready.pid, "device": ready.device, "device_name": ready.device_name}
        worker |= {"total_bytes": ready.total_bytes, "host_bytes": ready.host_bytes}
    if stats is not None:
        worker |= {"free_bytes": stats.free_bytes, "host_free_bytes": stats.host_free_bytes}
        worker |= {"kept_kv_bytes": stats.kept_kv_bytes, "hits": stats.hits}
        worker |= {"link_bytes_per_s": stats.link_bytes_per_s, "disk_bytes_per_s": stats.disk_bytes_per_s}
    return worker


def _place(place: Whereabouts | None) -> dict[str, object]:
    """Where a model's bytes are."""
    if place is None:
        return {}
    return {
        "tier": place.tier,
        "state": place.state,
        "host_bytes": place.host_bytes,
        "image_bytes": place.image_bytes,
        "kept_kv_bytes": place.kept_kv_bytes,
        "num_parked": place.num_parked,
    }


def _running(loaded: ModelReady, stats: ModelStats | None, stats_unix_s: float) -> dict[str, object]:
    fields: dict[str, object] = {
        "size": loaded.weight_bytes + loaded.kv_cache_bytes,
        "size_vram": loaded.weight_bytes + loaded.kv_cache_bytes,
        "context_length": loaded.max_model_len,
        "expires_at": _FOR_EVER,
        "dtype": loaded.dtype,
        "weight_bytes": loaded.weight_bytes,
        "kv_cache_bytes": loaded.kv_cache_bytes,
    }
    if stats is not None:
        if stats.expires_in_s is not None:
            fields["expires_at"] = timestamp(stats_unix_s + stats.expires_in_s)
        fields |= {
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "kv_usage": stats.kv_usage,
            "is_pinned": stats.is_pinned,
        }
    return fields


def _find_template(folder: Path) -> str | None:
    try:
        return read_tokenizer_files(folder).chat_templates.get("default")
    except CheckpointError:
        return None
