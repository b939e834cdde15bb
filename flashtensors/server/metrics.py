"""What Prometheus may ask: vLLM's metric meanings under our prefix, plus loads and evictions.

Intervals are measured here, in one process, on the monotonic clock. Counters that a worker reports are cumulative since
a model's load; the difference to the last report is added, so a reload does not turn a counter back.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..worker.messages import FirstToken, ModelLanded
from ..worker.stats import ModelStats, Stats

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_CUMULATIVE = ("num_preemptions", "prefix_queries", "prefix_hits")


class Metrics:
    """Every metric of one daemon, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests_running = self._gauge("num_requests_running", "Sequences that the worker computes now.")
        self.requests_waiting = self._gauge("num_requests_waiting", "Requests in the worker's queue.")
        self.requests_loading = self._gauge("num_requests_waiting_for_load", "Requests whose model is loading.")
        self.kv_cache_usage = self._gauge("kv_cache_usage_perc", "Share of KV cache blocks in use, 0 to 1.")
        self.resident_bytes = self._gauge("model_resident_bytes", "Bytes of weights and KV cache on the device.")
        self.preemptions = self._counter("num_preemptions", "Sequences put back to the queue to free KV cache.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.request_success = self._counter("request_success", "Answers that ended.", "finished_reason")
        self.request_failure = self._counter("request_failure", "Requests that ended in an error.", "code")
        self.time_to_first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.")
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between tokens of an answer.", _TOKEN_BUCKETS
        )
        self.e2e_request_latency = self._histogram("e2e_request_latency_seconds", "Arrival to last token.")
        self.load_wait = self._histogram("request_load_wait_seconds", "What requests waited for their model's load.")
        self.loads = self._counter("model_loads", "Loads that succeeded, by the tier they came from.", "source")
        self.load_failures = self._counter("model_load_failures", "Loads that failed.", "code")
        self.load_bytes = self._counter("model_load_bytes", "Bytes that loads moved, by where they were.", "source")
        self.load_seconds = self._counter("model_load_seconds", "Seconds that loads took, by phase.", "phase")
        self.swaps = Counter(
            "flashtensors_model_swaps", "Loads for which other models had to leave.", registry=self.registry
        )
        self.tier_bytes = Gauge(
            "flashtensors_tier_bytes", "Bytes that models hold, by tier.", ["tier"], registry=self.registry
        )
        self.tier_hits = Counter(
            "flashtensors_tier_hits",
            "Requests by the tier that their model was in when they came.",
            ["tier"],
            registry=self.registry,
        )
        self.tier_first_token = Histogram(
            "flashtensors_tier_time_to_first_token_seconds",
            "Arrival at the worker to first token, by the tier that the model was in.",
            ["tier"],
            registry=self.registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.unloads = self._counter("model_unloads", "Models that left the device, by reason.", "reason")
        self.worker_restarts = Counter(
            "flashtensors_worker_restarts", "Times that a dead worker was replaced.", registry=self.registry
        )
        self._last_seen: dict[str, ModelStats] = {}
        self._last_hits: dict[str, int] = {}

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"flashtensors_{name}", text, ["model_name"], registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flashtensors_{name}", text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _LATENCY_BUCKETS) -> Histogram:
        return Histogram(f"flashtensors_{name}", text, ["model_name"], registry=self.registry, buckets=buckets)

    def observe_load(self, landed: ModelLanded) -> None:
        """Count a load that has ended."""
        self.loads.labels(landed.model, landed.source).inc()
        self.load_bytes.labels(landed.model, "disk").inc(landed.disk_bytes)
        self.load_bytes.labels(landed.model, "host").inc(landed.num_bytes - landed.disk_bytes)
        for phase, seconds in landed.phase_seconds.items():
            self.load_seconds.labels(landed.model, phase).inc(max(0.0, seconds))

    def observe_first_token(self, first: FirstToken) -> None:
        """Count what a request waited for its model and for its first token."""
        if first.waited_s > 0:
            self.load_wait.labels(first.model).observe(first.waited_s)
        if first.is_streamed:
            self.tier_first_token.labels(first.tier).observe(first.seconds)
            if first.waited_s > 0:
                self.load_seconds.labels(first.model, "first_token").inc(first.seconds - first.waited_s)

    def observe_stats(self, stats: Stats) -> None:
        """Take over a worker's report; gauges of models that left are removed."""
        device_bytes = sum(model.weight_bytes + model.kv_cache_bytes for model in stats.models)
        self.tier_bytes.labels("device").set(device_bytes + stats.kept_kv_bytes)
        self.tier_bytes.labels("host").set(stats.host_bytes - stats.host_free_bytes)
        for tier, num_hits in stats.hits.items():
            self.tier_hits.labels(tier).inc(max(0, num_hits - self._last_hits.get(tier, 0)))
        self._last_hits = stats.hits
        present = {model.model for model in stats.models}
        for name in set(self._last_seen) - present:
            self.forget(name)
        for model in stats.models:
            self.requests_running.labels(model.model).set(model.num_running)
            self.requests_waiting.labels(model.model).set(model.num_waiting)
            self.kv_cache_usage.labels(model.model).set(model.kv_usage)
            self.resident_bytes.labels(model.model).set(model.weight_bytes + model.kv_cache_bytes)
            self._add_cumulative(model)

    def forget(self, name: str) -> None:
        """Drop the gauges of a model that is no longer loaded; its counters stay."""
        if self._last_seen.pop(name, None) is not None:
            for gauge in (self.requests_running, self.requests_waiting, self.kv_cache_usage, self.resident_bytes):
                gauge.remove(name)

    def forget_all(self) -> None:
        """Drop the gauges of every model: the worker is gone."""
        self._last_hits = {}
        self.tier_bytes.clear()
        for name in list(self._last_seen):
            self.forget(name)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _add_cumulative(self, model: ModelStats) -> None:
        counters = dict(zip(_CUMULATIVE, (self.preemptions, self.prefix_queries, self.prefix_hits), strict=True))
        last = self._last_seen.get(model.model)
        for field, counter in counters.items():
            now, before = getattr(model, field), getattr(last, field, 0)
            counter.labels(model.model).inc(now - before if now >= before else now)
        self._last_seen[model.model] = model
