"""Many webhooks of one tenant, and their effect on other tenants."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from fixtures_engines import OpenBus
from receiver import until

from img2img_server.domain.job import Job, State
from img2img_server.domain.params import JobParams
from img2img_server.nats.bus import Bus
from img2img_server.webhooks.dispatcher import MOST_OF_A_TENANT, BackoffPolicy, WebhookDispatcher
from img2img_server.webhooks.sender import Outcome
from img2img_server.webhooks.signature import Signer

GREEDY, MODEST = "https://black.example/hole", "https://modest.example/hook"
CROWD = 5 * MOST_OF_A_TENANT
QUICK = BackoffPolicy(delays_seconds=(60.0,) * 7, overflow_seconds=0.02)


class Receivers:
    """Two receivers, of which one responds only once `may_answer` is set.

    Counts the deliveries by job, and the largest number of them at once.
    """

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.modest_got_one = asyncio.Event()
        self.got: Counter[str] = Counter()
        self.under_way = 0
        self.most_under_way = 0

    async def post(self, address: str, _body: bytes, headers: Mapping[str, str]) -> Outcome:
        self.got[headers["webhook-id"]] += 1
        if address == MODEST:
            self.modest_got_one.set()
            return Outcome(delivered=True)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await self.may_answer.wait()
        self.under_way -= 1
        return Outcome(delivered=True)

    async def received(self) -> int:
        return len(self.got)


@asynccontextmanager
async def delivering(bus: Bus, receivers: Receivers) -> AsyncIterator[None]:
    async def payload(_: Job) -> bytes:
        return b"{}"

    stop = asyncio.Event()
    deliverer = WebhookDispatcher(
        bus.outbox, bus.jobs, payload, receivers.post, Signer(), QUICK, drain_seconds=1.0
    )
    running = asyncio.create_task(deliverer.run(stop))
    try:
        yield
    finally:
        receivers.may_answer.set()
        stop.set()
        await running


def a_job(number: int, tenant: str, webhook: str) -> Job:
    return Job(
        id=10_000_000 + number,
        tenant=tenant,
        params=JobParams(prompt="a lighthouse", webhook=webhook),
        file_prefix="5e0c8a0e",
        future_urls=(),
        create_time=1_770_000_000.0,
        state=State.SUCCEEDED,
    )


async def test_a_tenant_whose_receiver_is_silent_delays_no_other_tenant_and_loses_nothing(
    open_bus: OpenBus,
) -> None:
    receivers = Receivers()
    async with open_bus() as bus:
        crowd = [a_job(number, "greedy", GREEDY) for number in range(CROWD)]
        modest = a_job(CROWD, "modest", MODEST)
        for job in (*crowd, modest):
            await bus.jobs.create(job)
            await bus.outbox.put(job)
        async with delivering(bus, receivers):
            async with asyncio.timeout(30):
                await receivers.modest_got_one.wait()
            assert receivers.most_under_way == MOST_OF_A_TENANT
            receivers.may_answer.set()
            await until(receivers.received, CROWD + 1)

            async def waiting() -> list[str]:
                stored = [await bus.jobs.get(job.tenant, job.id) for job in crowd]
                statuses = {each.job.webhook_status if each else "gone" for each in stored}
                return sorted(statuses - {"success"})

            await until(waiting, [])
        assert set(receivers.got.values()) == {1}
        assert receivers.most_under_way == MOST_OF_A_TENANT
        record = await bus.jobs.get("greedy", crowd[0].id)
        assert record is not None
        assert record.job == replace(crowd[0], webhook_status="success", webhook_attempts=1)
