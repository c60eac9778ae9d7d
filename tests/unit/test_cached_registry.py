"""The cache of worker announcements."""

import asyncio

import pytest

from img2img_server.api.worker_cache import CachedWorkerRegistry
from img2img_server.domain.models import WorkerInfo
from img2img_server.errors import UnavailableError
from img2img_server.testing.fake_engine import FAKE_MODEL
from img2img_server.testing.memory_records import MemoryWorkerRegistry

ONE = WorkerInfo(name="one", model=FAKE_MODEL, device="cpu")
TWO = WorkerInfo(name="two", model=FAKE_MODEL, device="cpu")


class Registry(MemoryWorkerRegistry):
    """A registry that counts reads, can be unavailable, and responds when the test allows it."""

    def __init__(self) -> None:
        super().__init__(ttl_seconds=1e9)
        self.asked = 0
        self.away = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def announced(self) -> list[WorkerInfo]:
        self.asked += 1
        found = await super().announced()
        await self.may_answer.wait()
        if self.away:
            raise UnavailableError
        return found


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def registry() -> Registry:
    registry = Registry()
    await registry.announce(ONE)
    return registry


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cached(registry: Registry, clock: Clock) -> CachedWorkerRegistry:
    return CachedWorkerRegistry(registry, seconds=1.0, clock=clock)


async def settled() -> None:
    """Lets all tasks run that do not wait for an event."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_within_a_second_it_is_asked_once(
    cached: CachedWorkerRegistry, registry: Registry, clock: Clock
) -> None:
    assert await cached.workers() == [ONE]
    clock.now += 0.9
    assert await cached.workers() == [ONE]
    assert registry.asked == 1


async def test_a_result_that_was_just_read_is_not_read_again_for_lack_of_a_serving_worker(
    clock: Clock,
) -> None:
    registry = Registry()
    cached = CachedWorkerRegistry(registry, seconds=1.0, clock=clock)
    assert await cached.workers() == []
    assert registry.asked == 1
    await registry.announce(ONE)
    assert await cached.workers() == [ONE]


async def test_a_steady_caller_does_not_wait_and_gets_news_the_next_time(
    cached: CachedWorkerRegistry, registry: Registry, clock: Clock
) -> None:
    await cached.workers()
    await registry.announce(TWO)
    clock.now += 1.1
    registry.may_answer.clear()
    assert await cached.workers() == [ONE]
    assert await cached.workers() == [ONE]
    registry.may_answer.set()
    await settled()
    assert await cached.workers() == [ONE, TWO]
    assert registry.asked == 2, "two callers, one question"


async def test_no_view_lists_a_worker_that_another_one_no_longer_has(
    cached: CachedWorkerRegistry, registry: Registry, clock: Clock
) -> None:
    await registry.announce(TWO)
    await cached.workers()
    await registry.withdraw("one")
    clock.now += 1.1
    for _ in range(2):  # The first result is an old one, the second is fresh.
        announced, serving = await cached.announced(), await cached.workers()
        assert announced == serving
        assert {worker.name for worker in serving} == await cached.names()
        await settled()
    assert serving == [TWO]


async def test_what_is_too_old_is_waited_for(
    cached: CachedWorkerRegistry, registry: Registry, clock: Clock
) -> None:
    await cached.workers()
    await registry.announce(TWO)
    clock.now += 2.1
    assert await cached.workers() == [ONE, TWO]


async def test_unavailability_is_reported_only_when_the_cached_result_is_too_old(
    cached: CachedWorkerRegistry, registry: Registry, clock: Clock
) -> None:
    await cached.workers()
    registry.away = True
    clock.now += 1.1
    assert await cached.workers() == [ONE]
    await settled()
    assert await cached.workers() == [ONE]
    clock.now += 2
    with pytest.raises(UnavailableError):
        await cached.workers()


async def test_what_was_asked_before_a_forget_does_not_come_back(
    cached: CachedWorkerRegistry, registry: Registry, clock: Clock
) -> None:
    await cached.workers()
    clock.now += 1.1
    registry.may_answer.clear()
    await cached.workers()
    await settled()  # The read has begun, with the old result.
    await registry.announce(TWO)
    cached.forget()
    registry.may_answer.set()
    await settled()
    assert await cached.workers() == [ONE, TWO]


async def test_a_read_that_runs_during_a_forget_is_not_cached(
    cached: CachedWorkerRegistry, registry: Registry
) -> None:
    registry.may_answer.clear()
    waiting = asyncio.create_task(cached.workers())
    await settled()  # The read has begun, with the old result.
    await registry.announce(TWO)
    cached.forget()
    registry.may_answer.set()
    assert await waiting == [ONE]
    assert await cached.workers() == [ONE, TWO]
