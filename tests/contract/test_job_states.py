"""The contract of the store of suspended jobs' states, in memory and on JetStream."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from img2img_server.interfaces.states import StateTooLargeError
from img2img_server.nats import subjects
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.nats.connection import connect
from img2img_server.nats.states import MOST_BYTES
from img2img_server.nats.topology import STATE_CHUNK_BYTES, STATES_BYTES
from img2img_server.settings import Settings

JOB = 10_000_001


@pytest.mark.parametrize("size", [1, STATE_CHUNK_BYTES, 3 * STATE_CHUNK_BYTES + 7])
async def test_a_state_comes_back_as_it_was_until_it_is_removed(bus: Bus, size: int) -> None:
    data = os.urandom(size)
    key = await bus.states.save(JOB, data)
    other = await bus.states.save(JOB, b"of the next worker")
    assert key != other
    assert await bus.states.load(key, size) == data
    await bus.states.remove(key)
    await bus.states.remove(key)
    assert await bus.states.load(key, size) is None
    assert await bus.states.load(other, 18) == b"of the next worker"


async def test_a_state_above_the_limit_is_refused(bus: Bus) -> None:
    with pytest.raises(StateTooLargeError, match="bytes"):
        await bus.states.save(JOB, bytes(MOST_BYTES + 1))


async def test_states_do_not_need_more_room_than_all_together_may_have(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings()
    most = STATES_BYTES // STATE_CHUNK_BYTES
    async with (
        connect_bus(config) as bus,
        connect([config.nats_url.get_secret_value()]) as link,
    ):
        subject = subjects.state_subject("others", "0")
        await asyncio.gather(*(link.publish(subject, b"") for _ in range(most - 1)))
        with pytest.raises(StateTooLargeError, match="room"):
            await bus.states.save(JOB, bytes(2 * STATE_CHUNK_BYTES))
        info = await link.js.stream_info(subjects.STATES)
        assert info.state.messages == most - 1  # The part of the state is removed.
        assert await bus.states.load(await bus.states.save(JOB, b"small"), 5) == b"small"
