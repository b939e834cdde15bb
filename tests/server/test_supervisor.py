import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from flashtensors.errors import TransferError, WorkerError
from flashtensors.request import EngineRequest, SamplingParams
from flashtensors.server.mailbox import Mailbox
from flashtensors.server.metrics import Metrics
from flashtensors.server.supervisor import CRASHES_BEFORE_BACK_OFF, Supervisor
from flashtensors.worker.messages import LoadModel, Register

from .fake_worker import FakeScript

LOAD = LoadModel(model="m", folder="/nowhere")


def run(
    script: FakeScript, scenario: Callable[[Supervisor], Awaitable[None]], *, timeout_s: float | None = None
) -> Metrics:
    metrics = Metrics()

    async def main() -> None:
        supervisor = Supervisor(script.open_link, metrics, back_off_s=0.01, timeout_s=timeout_s)
        await supervisor.start()
        try:
            async with asyncio.timeout(10):
                await scenario(supervisor)
        finally:
            await supervisor.stop()

    asyncio.run(main())
    return metrics


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def drain(mailbox: Mailbox) -> None:
    while True:
        await mailbox.take()


def request(request_id: str = "r", **sampling: object) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        model="m",
        prompt_token_ids=[1],
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
    )


def test_many_first_requests_make_one_load() -> None:
    script = FakeScript(load_delay_s=0.02)

    async def scenario(supervisor: Supervisor) -> None:
        loaded = await asyncio.gather(*(supervisor.load(LOAD) for _ in range(10)))
        assert {one.model for one in loaded} == {"m"}
        assert script.links[0].commands == [LOAD]

    run(script, scenario)


def test_a_waiter_that_leaves_does_not_end_the_load() -> None:
    async def scenario(supervisor: Supervisor) -> None:
        impatient = asyncio.create_task(supervisor.load(LOAD))
        patient = asyncio.create_task(supervisor.load(LOAD))
        await asyncio.sleep(0.005)
        impatient.cancel()
        assert (await patient).model == "m"

    run(FakeScript(load_delay_s=0.02), scenario)


def test_a_failed_load_fails_all_who_wait_and_the_next_one_is_tried() -> None:
    script = FakeScript(load_error=TransferError("disk on fire"), load_delay_s=0.01)

    async def scenario(supervisor: Supervisor) -> None:
        results = await asyncio.gather(*(supervisor.load(LOAD) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [TransferError] * 3
        script.load_error = None
        assert (await supervisor.load(LOAD)).model == "m"

    run(script, scenario)


def test_a_dead_worker_fails_what_it_ran_and_is_replaced() -> None:
    script = FakeScript(dies_after_tokens=2)

    async def scenario(supervisor: Supervisor) -> None:
        await supervisor.load(LOAD)
        mailbox = Mailbox()
        supervisor.submit(request(), mailbox)
        with pytest.raises(WorkerError, match="exit code -9"):
            await drain(mailbox)
        assert supervisor.models.loaded == {}
        await until(lambda: supervisor.state == "ready")
        await supervisor.load(LOAD)
        mailbox = Mailbox()
        supervisor.submit(request(), mailbox)
        assert (await mailbox.take())[0].token_ids
        assert supervisor.num_restarts == 1
        assert script.links[0].is_closed

    run(script, scenario)


def test_a_worker_that_keeps_dying_is_left_alone_for_a_while() -> None:
    script = FakeScript(num_refused_starts=0)

    async def scenario(supervisor: Supervisor) -> None:
        for number in range(CRASHES_BEFORE_BACK_OFF):
            await until(lambda number=number: len(script.links) > number)
            script.links[-1].die()
        await until(lambda: supervisor.state == "backing_off")
        with pytest.raises(WorkerError, match="restarted soon"):
            await supervisor.load(LOAD)
        await until(lambda: supervisor.state == "ready")
        assert (await supervisor.load(LOAD)).model == "m"

    run(script, scenario)


def test_a_worker_that_cannot_be_started_again_is_tried_again() -> None:
    script = FakeScript()

    async def scenario(supervisor: Supervisor) -> None:
        await until(lambda: supervisor.state == "ready")
        script.num_refused_starts = 3
        script.links[0].die()
        await until(lambda: script.num_starts == 4 and supervisor.state == "ready")

    run(script, scenario)


def test_unloading_waits_for_the_worker_and_unknown_models_are_answered() -> None:
    script = FakeScript()

    async def scenario(supervisor: Supervisor) -> None:
        await supervisor.load(LOAD)
        assert set(supervisor.models.loaded) == {"m"}
        await supervisor.unload("m")
        assert supervisor.models.loaded == {}
        await supervisor.unload("stranger")

    metrics = run(script, scenario)
    assert b'model_unloads_total{model_name="m",reason="unload"} 1.0' in metrics.render()


def test_aborting_one_answer_leaves_the_others() -> None:
    script = FakeScript(token_delay_s=0.001)

    async def scenario(supervisor: Supervisor) -> None:
        await supervisor.load(LOAD)
        mailbox = Mailbox()
        supervisor.submit(request(n=2, max_tokens=20), mailbox)
        supervisor.abort("r", 0, "stop")
        reasons: dict[int, str] = {}
        while len(reasons) < 2:
            for delta in await mailbox.take():
                if delta.finish_reason is not None:
                    reasons[delta.index] = delta.finish_reason
        assert reasons == {0: "stop", 1: "length"}

    run(script, scenario)


def test_a_worker_that_hangs_is_ended_and_replaced() -> None:
    script = FakeScript()

    async def scenario(supervisor: Supervisor) -> None:
        await supervisor.load(LOAD)
        script.hangs = True
        mailbox = Mailbox()
        script.token_delay_s = 1000.0
        supervisor.submit(request(), mailbox)
        with pytest.raises(WorkerError, match="has not answered for"):
            await drain(mailbox)
        script.hangs = False
        await until(lambda: len(script.links) == 2 and supervisor.state == "ready")

    run(script, scenario, timeout_s=0.1)


def test_a_worker_that_answers_pings_lives_on() -> None:
    script = FakeScript()

    async def scenario(supervisor: Supervisor) -> None:
        await until(lambda: supervisor.state == "ready")
        await asyncio.sleep(0.5)
        assert len(script.links) == 1

    run(script, scenario, timeout_s=0.2)


def test_a_new_worker_knows_what_the_one_before_knew() -> None:
    script = FakeScript()
    registered = Register(model="m", folder="/nowhere")

    async def scenario(supervisor: Supervisor) -> None:
        supervisor.register(registered)
        supervisor.register(Register(model="gone", folder="/nowhere"))
        supervisor.forget_model("gone")
        pinned = msgspec.structs.replace(LOAD, is_pinned=True)
        await supervisor.load(pinned)
        script.links[0].die()
        await until(lambda: len(script.links) == 2 and "m" in supervisor.models.loaded)
        assert script.links[1].commands == [registered, pinned]
        mailbox = Mailbox()
        supervisor.submit(request(), mailbox)
        assert (await mailbox.take())[0].token_ids

    run(script, scenario)


def test_a_prefetch_is_answered_to_all_who_asked() -> None:
    script = FakeScript()

    async def scenario(supervisor: Supervisor) -> None:
        answers = await asyncio.gather(*(supervisor.prefetch("m") for _ in range(3)))
        assert [answer.host_bytes for answer in answers] == [1000] * 3
        assert len(script.links[0].commands) == 1

    run(script, scenario)
