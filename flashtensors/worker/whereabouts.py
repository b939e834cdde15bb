"""What a worker says of its models in its reports."""

from __future__ import annotations

from ..residency.machine import Residency
from ..residency.tiers import State
from .loading import LoadedModel
from .stats import ModelStats, Stats, Whereabouts


def make_stats(residency: Residency, loaded: dict[str, LoadedModel], hits: dict[str, int], now_s: float) -> Stats:
    """State of every model that is not on disk alone."""
    return Stats(
        models=[_model_stats(residency, model, each, now_s) for model, each in loaded.items()],
        loading=residency.models_in(State.LOADING),
        free_bytes=residency.device.free_bytes,
        whereabouts=[_whereabouts(residency, model) for model in residency.known_models()],
        host_bytes=residency.host.capacity_bytes,
        host_free_bytes=residency.host.free_bytes,
        kept_kv_bytes=residency.device.total_kept_bytes,
        hits=dict(hits),
        link_bytes_per_s=residency.rates.link_bytes_per_s,
        disk_bytes_per_s=residency.rates.disk_bytes_per_s,
        at_s=now_s,
    )


def _whereabouts(residency: Residency, model: str) -> Whereabouts:
    return Whereabouts(
        model=model,
        tier=residency.tier(model).value,
        state=residency.state(model).value,
        host_bytes=residency.host.held_bytes(model),
        image_bytes=residency.image_bytes(model),
        kept_kv_bytes=residency.device.kept_bytes(model),
        num_parked=residency.num_waiting(model),
    )


def _model_stats(residency: Residency, model: str, loaded: LoadedModel, now_s: float) -> ModelStats:
    stats = loaded.engine.stats()
    return ModelStats(
        model=model,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        kv_usage=stats.kv_usage,
        weight_bytes=loaded.weight_bytes,
        kv_cache_bytes=loaded.kv_cache_bytes,
        expires_in_s=residency.expires_in_s(model, now_s),
        is_pinned=residency.is_pinned(model),
        num_preemptions=stats.num_preemptions,
        prefix_queries=stats.prefix_queries,
        prefix_hits=stats.prefix_hits,
        num_generated=stats.num_generated,
    )
