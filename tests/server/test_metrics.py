from prometheus_client.parser import text_string_to_metric_families

from flashtensors.server.metrics import Metrics
from flashtensors.worker.messages import ModelLoaded, ModelStats, Stats


def stats(**fields: object) -> Stats:
    values: dict[str, object] = {
        "model": "m",
        "num_running": 3,
        "num_waiting": 1,
        "kv_usage": 0.5,
        "weight_bytes": 100,
        "kv_cache_bytes": 20,
        "expires_in_s": None,
        "is_pinned": False,
        "num_preemptions": 2,
        "prefix_queries": 50,
        "prefix_hits": 30,
    }
    return Stats(models=[ModelStats(**{**values, **fields})], loading=[], free_bytes=0)  # type: ignore[arg-type]


def sample(metrics: Metrics, name: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for one in family.samples:
            if one.name == f"flashtensors_{name}" and one.labels.get("model_name") == "m":
                return one.value
    return None


def test_a_report_becomes_gauges() -> None:
    metrics = Metrics()
    metrics.observe_stats(stats())
    assert sample(metrics, "num_requests_running") == 3
    assert sample(metrics, "num_requests_waiting") == 1
    assert sample(metrics, "kv_cache_usage_perc") == 0.5
    assert sample(metrics, "model_resident_bytes") == 120


def test_a_reload_does_not_turn_counters_back() -> None:
    metrics = Metrics()
    metrics.observe_stats(stats(prefix_queries=50))
    metrics.observe_stats(stats(prefix_queries=80))
    metrics.observe_stats(stats(prefix_queries=10))
    assert sample(metrics, "prefix_cache_queries_total") == 90


def test_gauges_of_a_model_that_left_are_gone() -> None:
    metrics = Metrics()
    metrics.observe_stats(stats())
    metrics.observe_stats(Stats(models=[], loading=[], free_bytes=0))
    assert sample(metrics, "num_requests_running") is None
    assert sample(metrics, "num_preemptions_total") == 2


def test_only_real_loads_count() -> None:
    metrics = Metrics()
    for was_loaded in (False, True):
        metrics.observe_load(
            ModelLoaded(
                model="m", weight_bytes=100, kv_cache_bytes=0, num_kv_blocks=1, block_size=16, max_model_len=64,
                dtype="float32", phase_seconds={"read": 2.0}, was_loaded=was_loaded,
            )
        )  # fmt: skip
    assert sample(metrics, "model_loads_total") == 1
    assert sample(metrics, "model_load_bytes_total") == 100
    assert sample(metrics, "model_load_seconds_total") == 2.0
