"""Requests to the daemon with a clock in hand: many at once, streamed, read no further than the clock needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from ..config import Settings
from ..errors import CapacityError, DaemonError, FlashError
from ..server.client import answered_error
from ..server.launch import DaemonInfo

PATIENCE_S = 60.0
"""Seconds without a piece of any answer after which a daemon that has no room is no longer asked again."""
RETRY_S = 1.0
"""Pause before it is asked again, where it names none."""
_USAGE_MARK = b'"usage":{'
_ERROR_MARK = b'data: {"error"'


class TimedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, as its client saw it."""

    first_token_s: float
    """From the first time of sending to the first piece of text."""
    total_s: float
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int


class TimedClient:
    """Sends requests to one daemon; use it inside `async with`.

    Args:
        info: The daemon.
        settings: The key comes from here.
        num_at_once: Connections.
    """

    def __init__(self, info: DaemonInfo, settings: Settings, *, num_at_once: int) -> None:
        headers = {} if settings.api_key is None else {"authorization": f"Bearer {settings.api_key}"}
        limits = httpx.Limits(max_connections=num_at_once + 1, max_keepalive_connections=num_at_once + 1)
        self._http = httpx.AsyncClient(base_url=info.url, headers=headers, limits=limits, timeout=None, trust_env=False)
        self._num_at_once = num_at_once
        self._heard_s = time.perf_counter()
        """When the latest piece of an answer came."""

    async def __aenter__(self) -> TimedClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def answers(self, bodies: Iterable[Mapping[str, object]]) -> AsyncGenerator[TimedAnswer]:
        """Send completions, `num_at_once` at any time, and yield each answer when it has ended; raises its error.

        Who finds the queue full waits and asks again, as a user would, while there are answers for others.
        """
        self._heard_s = time.perf_counter()
        waiting = iter(bodies)
        running: set[asyncio.Task[TimedAnswer]] = set()
        done: set[asyncio.Task[TimedAnswer]] = set()
        try:
            while True:
                while len(running) < self._num_at_once and (body := next(waiting, None)) is not None:
                    running.add(asyncio.create_task(self.answer(body, is_patient=True)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, *done, return_exceptions=True)

    async def answer(self, body: Mapping[str, object], *, is_patient: bool = False) -> TimedAnswer:
        """Send one completion and read its stream.

        Args:
            body: What is asked.
            is_patient: Ask again where there is no room, unless no answer has gone on for `PATIENCE_S`.

        Raises:
            FlashError: What the daemon answers with.
            DaemonError: The connection broke.
        """
        fields = {**body, "stream": True, "stream_options": {"include_usage": True}}
        started_s = time.perf_counter()
        while True:
            try:
                async with self._http.stream("POST", "/v1/completions", json=fields) as response:
                    if response.status_code == 200:
                        return await self._read(response, started_s)
                    error = answered_error(response.status_code, await response.aread())
            except httpx.HTTPError as broken:
                raise DaemonError(f"the connection to the daemon broke: {type(broken).__name__}: {broken}") from broken
            is_stuck = time.perf_counter() - self._heard_s >= PATIENCE_S
            if not is_patient or not isinstance(error, CapacityError) or is_stuck:
                raise error
            await asyncio.sleep(float(response.headers.get("retry-after", RETRY_S)))

    async def _read(self, response: httpx.Response, started_s: float) -> TimedAnswer:
        first_token_s, tail = 0.0, b""
        async for chunk in response.aiter_raw():
            self._heard_s = time.perf_counter()
            if not first_token_s and b"data: {" in chunk:
                first_token_s = self._heard_s - started_s
            tail = tail[-2000:] + chunk
        return _timed(tail, first_token_s, time.perf_counter() - started_s)

    async def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """The daemon's metrics: sample name, then label values in the order of the labels' names."""
        text = (await self._http.get("/metrics")).text
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(sample.labels[name] for name in sorted(sample.labels))
                found.setdefault(sample.name, {})[labels] = sample.value
        return found


def _timed(tail: bytes, first_token_s: float, total_s: float) -> TimedAnswer:
    if _ERROR_MARK in tail:
        raise FlashError(f"the answer ended with an error: {tail[tail.index(_ERROR_MARK) :][:500]!r}")
    if _USAGE_MARK not in tail:
        raise FlashError("the answer ended without its usage; see the daemon's log")
    line = tail[: tail.rindex(_USAGE_MARK)].rfind(b"data: ")
    usage = msgspec.json.decode(tail[line + 6 : tail.index(b"\n", line)])["usage"]
    return TimedAnswer(
        first_token_s=first_token_s,
        total_s=total_s,
        num_prompt_tokens=usage["prompt_tokens"],
        num_tokens=usage["completion_tokens"],
        num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
    )


def percentile(samples: list[float], share: float) -> float:
    """The sample below which `share` of them lie."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
