"""Rate limits of keys: the algorithm with a simulated clock, and the count that apis share on both
buses.
"""

from __future__ import annotations

import asyncio

import pytest
from fixtures_engines import OpenBus

from img2img_server.nats.bus import Bus
from img2img_server.nats.rates import Rates
from img2img_server.testing.memory_records import MemoryBucket


async def test_as_many_as_a_minute_has_come_at_once_then_one_by_one() -> None:
    now = 1_000.0
    rates = Rates(MemoryBucket(), lambda: now)
    assert [await rates.take("k", 60) for _ in range(60)] == [0.0] * 60
    assert await rates.take("k", 60) == pytest.approx(1.0)
    now += 0.75
    assert await rates.take("k", 60) == pytest.approx(0.25)  # A rejected call is not counted.
    now += 0.25
    assert await rates.take("k", 60) == 0.0
    assert await rates.take("k", 60) == pytest.approx(1.0)


async def test_the_wait_is_known_without_counting() -> None:
    now = 1_000.0
    rates = Rates(MemoryBucket(), lambda: now)
    assert [rates.wait("k", 2) for _ in range(3)] == [0.0] * 3
    assert [await rates.take("k", 2) for _ in range(2)] == [0.0] * 2
    assert rates.wait("k", 2) == await rates.take("k", 2) == pytest.approx(30.0)


async def test_after_a_quiet_minute_there_is_room_for_all_again() -> None:
    now = 1_000.0
    rates = Rates(MemoryBucket(), lambda: now)
    for _ in range(2):
        assert [await rates.take("k", 3) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(20)]
        now += 60


async def test_each_key_has_its_own_count(bus: Bus) -> None:
    assert [await bus.rates.take("a", 1), await bus.rates.take("b", 1)] == [0.0, 0.0]
    assert 0 < await bus.rates.take("a", 1) <= 60


async def test_apis_share_the_count(open_bus: OpenBus) -> None:
    async with open_bus() as one, open_bus() as other:
        takes = [bus.rates.take("k", 5) for bus in (one, other) for _ in range(10)]
        waits = await asyncio.gather(*takes)
    assert waits.count(0.0) == 5
    assert all(0 < wait <= 12 for wait in waits if wait)


async def test_a_count_that_has_expired_begins_again() -> None:
    now = 1_000.0
    values = MemoryBucket()
    rates = Rates(values, lambda: now)
    assert [await rates.take("k", 1), await rates.take("k", 1)] == [0.0, 60.0]
    await values.remove("k")
    now += 120
    assert [await rates.take("k", 1), await rates.take("k", 1)] == [0.0, 60.0]
