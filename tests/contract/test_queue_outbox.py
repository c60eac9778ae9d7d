"""The outbox of webhooks, in memory and on JetStream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

import pytest

from img2img_server.domain.job import Job, State
from img2img_server.domain.params import JobParams
from img2img_server.interfaces.webhooks import OutboxFullError, PendingWebhook, WebhookOutbox
from img2img_server.nats.connection import connect
from img2img_server.nats.topology import Bounds, prepare
from img2img_server.nats.webhooks import JetStreamWebhookOutbox
from img2img_server.testing.memory_webhooks import MemoryWebhookOutbox

LIMIT = 3
ACK_WAIT_SECONDS = 0.5
SOON = 0.05  # seconds; long enough to detect a message when none is expected
LONG = 60.0  # seconds; a timeout that no passing test reaches

OpenOutbox = Callable[[], AbstractAsyncContextManager[WebhookOutbox]]


def a_job(number: int = 1, *, tenant: str = "acme") -> Job:
    return Job(
        id=10_000_000 + number,
        tenant=tenant,
        params=JobParams(prompt="a lighthouse", webhook="https://hooks.example.org/a"),
        file_prefix="5e0c8a0e",
        future_urls=("http://127.0.0.1/generations/5e0c8a0e-0.png",),
        create_time=1_770_000_000.0,
        state=State.SUCCEEDED,
    )


@pytest.fixture(params=["memory", "jetstream"])
def open_outbox(request: pytest.FixtureRequest) -> OpenOutbox:
    """Connects to an empty outbox that holds 3 webhooks for each tenant. Each call opens a new
    connection.
    """
    if request.param == "memory":
        shared = MemoryWebhookOutbox(limit=LIMIT, ack_wait_seconds=ACK_WAIT_SECONDS)
        return lambda: nullcontext(shared)
    url = request.getfixturevalue("engine_settings")().nats_url.get_secret_value()

    @asynccontextmanager
    async def on_jetstream() -> AsyncIterator[WebhookOutbox]:
        async with connect([url]) as link:
            await prepare(link, Bounds(webhook_limit=LIMIT))
            yield JetStreamWebhookOutbox(link, ack_wait_seconds=ACK_WAIT_SECONDS)

    return on_jetstream


@pytest.fixture
async def outbox(open_outbox: OpenOutbox) -> AsyncIterator[WebhookOutbox]:
    async with open_outbox() as connected:
        yield connected


async def pull_one(outbox: WebhookOutbox) -> PendingWebhook:
    (pending,) = await outbox.pull(1, LONG)
    return pending


async def test_a_webhook_arrives_with_its_job_as_it_ended(outbox: WebhookOutbox) -> None:
    job = a_job()
    await outbox.put(job)
    pending = await pull_one(outbox)
    assert (pending.job, pending.deliveries) == (job, 1)


async def test_a_waiting_pull_gets_what_is_put_later(open_outbox: OpenOutbox) -> None:
    async with open_outbox() as worker, open_outbox() as api, asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(pull_one(api))
        assert await worker.pull(1, SOON) == []  # After this round trip, the other pull waits too.
        await worker.put(a_job())
        assert (await waiting).job == a_job()


async def test_the_webhook_of_a_job_is_stored_once_unless_asked_for_again(
    outbox: WebhookOutbox,
) -> None:
    await outbox.put(a_job())
    await outbox.put(a_job())
    await (await pull_one(outbox)).done()
    await outbox.put(a_job())
    assert await outbox.pull(5, SOON) == []
    await outbox.put(a_job(), again=True)
    pending = await pull_one(outbox)
    assert (pending.job, pending.deliveries) == (a_job(), 1)


async def test_what_is_done_does_not_come_again(outbox: WebhookOutbox) -> None:
    await outbox.put(a_job())
    await (await pull_one(outbox)).done()
    assert await outbox.pull(1, 1.4 * ACK_WAIT_SECONDS) == []


async def test_a_webhook_comes_again_after_the_delay_and_not_before(outbox: WebhookOutbox) -> None:
    await outbox.put(a_job())
    pending = await pull_one(outbox)
    started = time.monotonic()
    # The delay is longer than ack_wait.
    await pending.retry(2 * ACK_WAIT_SECONDS)
    again = await pull_one(outbox)
    assert time.monotonic() - started > 1.9 * ACK_WAIT_SECONDS
    assert (again.job, again.deliveries) == (a_job(), 2)


async def test_one_that_waits_does_not_hold_up_the_others(outbox: WebhookOutbox) -> None:
    await outbox.put(a_job(1))
    await (await pull_one(outbox)).retry(LONG)
    await outbox.put(a_job(2))
    assert (await pull_one(outbox)).job == a_job(2)


async def test_a_webhook_whose_taker_died_comes_to_another_one(open_outbox: OpenOutbox) -> None:
    async with open_outbox() as survivor:
        async with open_outbox() as lost:
            await lost.put(a_job())
            await pull_one(lost)
        again = await pull_one(survivor)
        assert (again.job, again.deliveries) == (a_job(), 2)


async def test_none_is_taken_twice(open_outbox: OpenOutbox) -> None:
    async with open_outbox() as one, open_outbox() as two:
        jobs = [a_job(number) for number in range(1, LIMIT + 1)]
        for job in jobs:
            await one.put(job)
        taken: list[int] = []
        while len(taken) < len(jobs):
            pulled = await asyncio.gather(one.pull(2, SOON), two.pull(2, SOON))
            taken += [pending.job.id for pendings in pulled for pending in pendings]
        assert sorted(taken) == [job.id for job in jobs]


async def test_a_cancelled_pull_loses_none(outbox: WebhookOutbox) -> None:
    pulling = asyncio.create_task(pull_one(outbox))
    assert await outbox.pull(1, SOON) == []  # After this round trip, the other pull waits too.
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    await outbox.put(a_job())
    assert (await pull_one(outbox)).job == a_job()


async def test_a_tenant_may_have_so_many_waiting_and_others_are_not_touched(
    outbox: WebhookOutbox,
) -> None:
    for number in range(LIMIT):
        await outbox.put(a_job(number))
    with pytest.raises(OutboxFullError):
        await outbox.put(a_job(LIMIT))
    await outbox.put(a_job(LIMIT + 1, tenant="other"))
    await (await pull_one(outbox)).done()
    await outbox.put(a_job(LIMIT + 2))
