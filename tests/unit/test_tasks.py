"""Background tasks and their end."""

from __future__ import annotations

import asyncio

import pytest

from img2img_server.lifecycle import unless_stopped
from img2img_server.tasks import reraise_cancellation


async def test_a_cancellation_that_comes_together_with_an_answer_is_heeded() -> None:
    answer = asyncio.get_running_loop().create_future()

    async def ask() -> None:
        with reraise_cancellation():
            await asyncio.wait_for(answer, 60)

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0)
    answer.set_result("yes")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_what_a_cancelled_task_still_asks_for_is_answered() -> None:
    answer = asyncio.get_running_loop().create_future()

    async def ask() -> str:
        try:
            await asyncio.Event().wait()
        finally:
            with reraise_cancellation():
                said: str = await answer
            return said  # noqa: B012

    asking = asyncio.create_task(ask())
    await asyncio.sleep(0)
    asking.cancel()
    answer.set_result("yes")
    assert await asking == "yes"


async def test_work_that_a_timeout_cancels_does_not_continue_in_the_background() -> None:
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await unless_stopped(asyncio.Event(), work())
    assert cancelled.is_set()
