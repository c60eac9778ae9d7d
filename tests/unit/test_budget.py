"""Budgets: the most that a tenant holds, the order of service, and refusals."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress

import pytest
from prometheus_client import REGISTRY

from img2img_server.budget import LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS, Budget, Share
from img2img_server.errors import ServerBusyError

LONG = 60.0  # seconds; longer than any test


def asked(budget: Budget, tenant: str, amount: int) -> asyncio.Task[Share]:
    return asyncio.create_task(budget.take(tenant, amount))


async def turns() -> None:
    """Lets every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def served(*tasks: asyncio.Task[Share]) -> list[bool]:
    return [task.done() for task in tasks]


async def test_one_tenant_leaves_room_for_another_at_any_time() -> None:
    budget = Budget("test", 4, 3, wait_seconds=LONG)
    alpha = [asked(budget, "alpha", 1) for _ in range(40)]
    await turns()

    assert sum(served(*alpha)) == 3
    with await budget.take("beta", 1):
        assert (budget.used(), budget.used("alpha"), budget.used("beta")) == (4, 3, 1)
    assert budget.waiting() == 37
    for task in alpha:
        task.cancel()


async def test_a_newcomer_is_served_before_the_waiting_requests_of_a_tenant_with_more() -> None:
    budget = Budget("test", 2, wait_seconds=LONG)
    held = [await budget.take("alpha", 1) for _ in range(2)]
    alpha, beta = asked(budget, "alpha", 1), asked(budget, "beta", 1)
    await turns()

    held[0].release()
    await turns()

    assert served(alpha, beta) == [False, True]
    held[1].release()
    await turns()
    assert served(alpha, beta) == [True, True]


async def test_requests_of_a_tenant_are_served_in_their_order() -> None:
    budget = Budget("test", 10, wait_seconds=LONG)
    first = await budget.take("alpha", 10)
    large, small = asked(budget, "alpha", 9), asked(budget, "alpha", 1)
    first.resize(5)
    await turns()
    assert served(large, small) == [False, False]

    first.release()
    await turns()

    assert served(large, small) == [True, True]


async def test_small_requests_do_not_starve_a_large_one() -> None:
    budget = Budget("test", 10, wait_seconds=LONG)
    held = await budget.take("alpha", 6)
    more = await budget.take("gamma", 2)
    large, small = asked(budget, "beta", 8), asked(budget, "gamma", 1)
    newcomer = asked(budget, "delta", 1)
    await turns()
    assert served(large, small, newcomer) == [False, False, True]
    newcomer.result().release()

    held.release()
    await turns()

    assert served(large, small) == [True, False]
    more.release()
    await turns()
    assert served(small) == [True]


async def test_a_request_that_does_not_fit_in_time_is_refused_with_the_time_to_wait() -> None:
    budget = Budget("test", 1, wait_seconds=0.02)
    with await budget.take("alpha", 1):
        with pytest.raises(ServerBusyError, match="its test are in use") as caught:
            await budget.take("beta", 1)
        assert budget.waiting() == 0

    assert caught.value.retry_seconds is not None
    assert LEAST_RETRY_SECONDS <= caught.value.retry_seconds <= MOST_RETRY_SECONDS
    (await budget.take("beta", 1)).release()


@pytest.mark.parametrize(
    ("amount", "wait_seconds", "most_waiting"), [(3, LONG, 9), (1, 0.0, 9), (1, LONG, 0)]
)
async def test_a_request_that_cannot_wait_is_refused_at_once(
    amount: int, wait_seconds: float, most_waiting: int
) -> None:
    budget = Budget("test", 2, wait_seconds=wait_seconds, most_waiting=most_waiting)
    await budget.take("alpha", 2)

    async with asyncio.timeout(LONG):
        with pytest.raises(ServerBusyError):
            await budget.take("beta", amount)


async def test_a_share_grows_within_the_budget_and_shrinks_for_others() -> None:
    budget = Budget("test", 10, 8, wait_seconds=LONG)
    share = budget.try_take("alpha", 2)
    share.resize(8)
    with pytest.raises(ServerBusyError):
        share.resize(9)
    waiting = asked(budget, "beta", 4)
    await turns()
    assert not waiting.done()

    share.resize(6)
    await turns()

    assert waiting.done()
    share.release()
    share.release()
    assert budget.used() == 4


async def test_a_caller_that_gives_up_lets_the_next_one_in() -> None:
    budget = Budget("test", 10, wait_seconds=LONG)
    held = await budget.take("alpha", 5)
    large, small = asked(budget, "beta", 9), asked(budget, "beta", 1)
    await turns()
    assert served(large, small) == [False, False]

    large.cancel()
    await turns()
    assert small.done()

    granted = asked(budget, "beta", 9)
    await turns()
    held.release()
    small.result().release()
    granted.cancel()  # The share is granted, but its task has not run since.
    await turns()
    assert budget.used() == 0


async def test_any_sequence_keeps_the_bounds_and_gives_everything_back() -> None:
    chance = random.Random(7)
    budget = Budget("test", 20, 15, wait_seconds=LONG)

    async def use(tenant: str) -> None:
        with await budget.take(tenant, chance.randint(1, 15)) as share:
            assert budget.used() <= 20
            assert budget.used(tenant) <= 15
            await asyncio.sleep(0)
            share.resize(chance.randint(0, share.amount))
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(use(chance.choice("abcd"))) for _ in range(300)]
    for task in chance.sample(tasks, 60):
        await asyncio.sleep(0)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}
    assert (budget.used(), budget.waiting()) == (0, 0)


async def test_the_metrics_name_the_budget_and_no_tenant() -> None:
    budget = Budget("metrics", 2)

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"img2img_budget_{name}", {"budget": "metrics"} | labels)

    with await budget.take("alpha", 2):
        with pytest.raises(ServerBusyError):
            await budget.take("beta", 1)
        assert (value("used"), value("total")) == (2, 2)
    assert value("used") == 0
    assert value("refused_total", why="full") == 1


async def test_any_number_of_tenants_leaves_room_for_another() -> None:
    budget = Budget("test", 1000, leaves_free=True)
    for number in range(6):
        with suppress(ServerBusyError):
            while budget.try_take(f"tenant{number}", 1):
                pass

    held = [budget.used(f"tenant{number}") for number in range(6)]
    assert held == [500, 250, 125, 63, 31, 16]
    assert budget.try_take("another", 1)


async def test_a_tenant_that_leaves_room_may_take_a_large_amount_at_once() -> None:
    budget = Budget("test", 10, leaves_free=True)

    with budget.try_take("alpha", 10):
        assert budget.used() == 10


async def test_a_small_request_does_not_pass_a_large_one_of_a_tenant_that_holds_nothing() -> None:
    budget = Budget("test", 10, leaves_free=True, wait_seconds=LONG)
    held = [budget.try_take("alpha", 1), budget.try_take("alpha", 4)]
    large = asked(budget, "beta", 8)
    await turns()
    small = asked(budget, "alpha", 1)

    held[0].release()
    await turns()
    assert served(large, small) == [False, False]

    held[1].release()
    await turns()
    assert served(large, small) == [True, True]
