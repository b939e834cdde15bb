import asyncio
import time

import pytest

from flashtensors.errors import CapacityError, WorkerError
from flashtensors.request import SequenceDelta
from flashtensors.server.mailbox import BUSY_AFTER_S, Mailbox


def delta(token: int) -> SequenceDelta:
    return SequenceDelta(request_id="r", index=0, token_ids=[token])


def test_a_late_reader_gets_all_at_once_and_in_order() -> None:
    async def scenario() -> list[int]:
        mailbox = Mailbox()
        for token in range(3):
            assert mailbox.put(delta(token))
        return [one.token_ids[0] for one in await mailbox.take()]

    assert asyncio.run(scenario()) == [0, 1, 2]


def test_a_reader_waits_for_mail() -> None:
    async def scenario() -> int:
        mailbox = Mailbox()
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        assert not reader.done()
        mailbox.put(delta(7))
        return (await reader)[0].token_ids[0]

    assert asyncio.run(scenario()) == 7


def test_a_reader_too_far_behind_is_dropped() -> None:
    async def scenario() -> None:
        mailbox = Mailbox(limit=2)
        assert mailbox.put(delta(0))
        assert mailbox.put(delta(1))
        assert not mailbox.put(delta(2))
        with pytest.raises(CapacityError):
            await mailbox.take()

    asyncio.run(scenario())


def test_the_first_failure_is_the_one_that_counts() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        mailbox.fail(WorkerError("first"))
        mailbox.fail(WorkerError("second"))
        with pytest.raises(WorkerError, match="first"):
            await mailbox.take()

    asyncio.run(scenario())


def test_a_reader_that_wakes_late_comes_back_later_and_gets_more_at_once() -> None:
    async def scenario() -> list[int]:
        mailbox = Mailbox()
        reader = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        mailbox.put(delta(0))
        time.sleep(4 * BUSY_AFTER_S)  # the loop is busy with others
        await reader
        reader = asyncio.create_task(mailbox.take())
        for token in (1, 2, 3):
            mailbox.put(delta(token))
            await asyncio.sleep(0)
            assert not reader.done()
        return [one.token_ids[0] for one in await reader]

    assert asyncio.run(scenario()) == [1, 2, 3]


def test_a_failure_is_not_waited_for() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        mailbox.put(delta(0))
        mailbox.fail(WorkerError("died"))
        with pytest.raises(WorkerError):
            await mailbox.take()

    asyncio.run(scenario())
