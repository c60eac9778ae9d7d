"""Turns of the event loop and shares of bytes between streams."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from img2img_server.nats.byte_shares import ByteShares
from img2img_server.nats.turns import Turns


async def test_an_event_for_many_streams_leaves_turns_for_other_tasks() -> None:
    turns, sent, seen = Turns(10), list[int](), list[int]()

    async def stream(number: int) -> None:
        for _ in range(3):
            await turns.turn()
            sent.append(number)

    streams = [asyncio.create_task(stream(number)) for number in range(200)]
    while not all(task.done() for task in streams):
        seen.append(len(sent))
        await asyncio.sleep(0)  # as an accepted call would
    assert len(sent) == 600
    assert max(later - earlier for earlier, later in pairwise(seen)) <= 20


async def test_a_cancelled_stream_takes_no_turn() -> None:
    turns = Turns(1)
    tasks = [asyncio.create_task(turns.turn()) for _ in range(5)]
    await asyncio.sleep(0)
    for task in tasks[:4]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not tasks[4].cancelled()


async def test_an_owner_waits_for_its_share_and_others_do_not() -> None:
    shares = ByteShares(100)
    assert shares.try_hold("alpha", 40)
    waiting = asyncio.create_task(shares.hold("alpha", 40))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert shares.try_hold("beta", 20)
    assert not shares.try_hold("alpha", 1)  # an earlier request of the owner waits
    shares.release("alpha", 40)
    await waiting
    assert shares.held == 60


async def test_the_first_bytes_of_an_owner_are_always_granted() -> None:
    shares = ByteShares(100)
    assert shares.try_hold("alpha", 1000)
    assert shares.try_hold("beta", 30)
    assert not shares.try_hold("beta", 30)


async def test_a_request_that_is_cancelled_holds_nothing() -> None:
    shares = ByteShares(100)
    shares.try_hold("alpha", 50)
    waiting = [asyncio.create_task(shares.hold("alpha", 50)) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    shares.release("alpha", 50)
    await waiting[1]
    await asyncio.gather(*waiting, return_exceptions=True)
    assert shares.held == 50
