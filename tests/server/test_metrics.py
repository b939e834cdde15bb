from prometheus_client.parser import text_string_to_metric_families

from flashtensors.server.metrics import Metrics
from flashtensors.worker.messages import FirstToken, ModelLanded
from flashtensors.worker.stats import ModelStats, Stats


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


def labelled(metrics: Metrics, name: str) -> dict[str, float]:
    """Samples of one metric by its last label."""
    return {
        list(one.labels.values())[-1]: one.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for one in family.samples
        if one.name == f"flashtensors_{name}"
    }


def test_a_load_counts_by_where_its_bytes_were() -> None:
    metrics = Metrics()
    metrics.observe_load(
        ModelLanded(
            model="m", source="disk", num_bytes=100, disk_bytes=70, host_bytes=30, reader="direct", total_s=3.0,
            phase_seconds={"queue": 1.0, "read": 2.0},
        )
    )  # fmt: skip
    assert labelled(metrics, "model_loads_total") == {"disk": 1}
    assert labelled(metrics, "model_load_bytes_total") == {"disk": 70, "host": 30}
    assert labelled(metrics, "model_load_seconds_total") == {"queue": 1.0, "read": 2.0}


def test_first_tokens_count_by_the_tier_that_was_hit() -> None:
    metrics = Metrics()
    metrics.observe_first_token(FirstToken("r", "m", "host", 0.3, 0.5, True))
    metrics.observe_first_token(FirstToken("s", "m", "device", 0.0, 0.1, True))
    metrics.observe_first_token(FirstToken("t", "m", "device", 0.0, 9.0, False))
    assert labelled(metrics, "tier_time_to_first_token_seconds_count") == {"host": 1, "device": 1}
    assert labelled(metrics, "model_load_seconds_total") == {"first_token": 0.2}
    assert sample(metrics, "request_load_wait_seconds_count") == 1


def test_hits_and_bytes_of_tiers_survive_a_restart_of_the_worker() -> None:
    metrics = Metrics()
    for num_hits in (3, 5):
        metrics.observe_stats(
            Stats(models=[], loading=[], free_bytes=0, host_bytes=10, host_free_bytes=4, hits={"host": num_hits})
        )
    assert labelled(metrics, "tier_bytes") == {"device": 0, "host": 6}
    metrics.forget_all()
    metrics.observe_stats(Stats(models=[], loading=[], free_bytes=0, hits={"host": 2}))
    assert labelled(metrics, "tier_hits_total") == {"host": 7}
