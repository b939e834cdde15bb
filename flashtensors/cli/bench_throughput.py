"""`flash bench throughput`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from ..checkpoint.architecture import read_model_config
from ..checkpoint.catalog import Catalog
from ..config import Settings
from ..errors import ConfigError
from ..server.client import DaemonClient
from .output import note, print_json, print_table
from .settings_options import settings_of
from .timed_requests import TimedAnswer, TimedClient, percentile

_POLL_S = 0.5
_SAY_EVERY_S = 5.0
_MIN_TOKEN_ID = 10
"""Lower ids tend to be special."""


class ThroughputReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run reached; seconds are the client's."""

    model: str
    num_requests: int
    seconds: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    token_p50_s: float
    """Median over answers of the time between tokens."""
    prefix_hit_share: float
    kv_usage_peak: float


@click.command("throughput")
@click.argument("model")
@click.option("--num-prompts", default=256, show_default=True, type=click.IntRange(1), help="Prompts to make up.")
@click.option("--input-len", default=256, show_default=True, type=click.IntRange(1), help="Tokens in each of them.")
@click.option("--output-len", default=128, show_default=True, type=click.IntRange(1), help="Tokens in each answer.")
@click.option(
    "--file", "path", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Prompts, one a line."
)
@click.option("--concurrency", type=click.IntRange(1), help="Requests at once; otherwise twice max_num_seqs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def throughput_command(
    ctx: click.Context,
    model: str,
    num_prompts: int,
    input_len: int,
    output_len: int,
    path: Path | None,
    concurrency: int | None,
    as_json: bool,
) -> None:
    """Send many prompts to MODEL at once and count tokens.

    Prompts are made up of random tokens, or read from a file. Answers go on to their full length. Starts the daemon
    when none runs; the model is loaded first.
    """
    settings = settings_of(ctx)
    record = Catalog(settings.store).get(model)
    if path is None:
        vocab_size = read_model_config(record.path).vocab_size
        prompts: list[Any] = list(made_up_prompts(num_prompts, input_len, vocab_size))
    else:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: holds no prompts; write one a line")
    bodies = [
        {"model": record.name, "prompt": prompt, "max_tokens": output_len, "ignore_eos": True} for prompt in prompts
    ]
    client = DaemonClient.connect_or_start(settings)
    client.post("/api/generate", {"model": record.name, "stream": False})
    num_at_once = concurrency or min(2 * settings.max_num_seqs, settings.max_queue)
    note(f"asking {record.name} for {len(bodies)} answers, {num_at_once} at once")
    report = asyncio.run(_run(client, settings, record.name, bodies, num_at_once))
    if as_json:
        print_json(report)
    else:
        print_report(report)


def made_up_prompts(count: int, num_tokens: int, vocab_size: int) -> Iterator[list[int]]:
    """Prompts of random tokens, the same in every run."""
    draw = random.Random(0)
    first = min(_MIN_TOKEN_ID, vocab_size - 1)
    for _ in range(count):
        yield [draw.randrange(first, vocab_size) for _ in range(num_tokens)]


def print_report(report: ThroughputReport) -> None:
    """The report as a table."""
    rows = (
        ("requests", f"{report.num_requests} in {report.seconds:.1f} s"),
        ("output", f"{report.output_tokens_per_s:,.0f} tokens/s"),
        ("prompts", f"{report.prompt_tokens_per_s:,.0f} tokens/s"),
        ("first token", f"{report.first_token_p50_s:.3f} s median, {report.first_token_p99_s:.3f} s p99"),
        ("between tokens", f"{report.token_p50_s * 1000:.1f} ms median"),
        ("KV cache", f"{report.kv_usage_peak:.0%} at most"),
        ("prefix hits", f"{report.prefix_hit_share:.0%} of prompt tokens"),
    )
    print_table((report.model, "REACHED"), rows)


async def _run(
    client: DaemonClient, settings: Settings, model: str, bodies: list[dict[str, Any]], num_at_once: int
) -> ThroughputReport:
    answers: list[TimedAnswer] = []
    usage: list[float] = [0.0]
    started_s = time.perf_counter()
    async with TimedClient(client.info, settings, num_at_once=num_at_once) as http:
        watch = asyncio.create_task(_watch(http, model, usage, lambda: f"{len(answers)} of {len(bodies)} answers"))
        try:
            async with contextlib.aclosing(http.answers(bodies)) as finished:
                async for answer in finished:
                    answers.append(answer)
        finally:
            watch.cancel()
    return _report(model, answers, time.perf_counter() - started_s, max(usage))


async def _watch(http: TimedClient, model: str, usage: list[float], progress_text: Callable[[], str]) -> None:
    """Note how full the KV cache is, and say now and then how far the answers are."""
    started_s = said_s = time.perf_counter()
    num_said: float | None = None
    while True:
        metrics = await http.metrics()
        usage.append(metrics.get("flashtensors_kv_cache_usage_perc", {}).get((model,), 0.0))
        num_tokens = metrics.get("flashtensors_generation_tokens_total", {}).get((model,), 0.0)
        num_said = num_tokens if num_said is None else num_said
        now_s = time.perf_counter()
        if now_s - said_s >= _SAY_EVERY_S:
            rate = (num_tokens - num_said) / (now_s - said_s)
            note(f"{progress_text()} after {now_s - started_s:.0f} s, {rate:,.0f} tokens/s now")
            said_s, num_said = now_s, num_tokens
        await asyncio.sleep(_POLL_S)


def _report(model: str, answers: list[TimedAnswer], seconds: float, kv_usage_peak: float) -> ThroughputReport:
    num_prompt_tokens = sum(answer.num_prompt_tokens for answer in answers)
    first_token_s = [answer.first_token_s for answer in answers]
    between_s = [(answer.total_s - answer.first_token_s) / max(1, answer.num_tokens - 1) for answer in answers]
    return ThroughputReport(
        model=model,
        num_requests=len(answers),
        seconds=seconds,
        prompt_tokens_per_s=num_prompt_tokens / seconds,
        output_tokens_per_s=sum(answer.num_tokens for answer in answers) / seconds,
        first_token_p50_s=percentile(first_token_s, 0.5),
        first_token_p99_s=percentile(first_token_s, 0.99),
        token_p50_s=percentile(between_s, 0.5),
        prefix_hit_share=sum(answer.num_cached_tokens for answer in answers) / max(1, num_prompt_tokens),
        kv_usage_peak=kv_usage_peak,
    )
