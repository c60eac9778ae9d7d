"""Webhooks from the end of a job to a real receiver, in memory and on NATS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
from fixtures_engines import OpenBus
from receiver import SECRET, receiving, until
from standardwebhooks import Webhook
from web_peers import Names, answer, listening, origin

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, job_pb2, service_pb2
from img2img_server.api.server import Webhooks
from img2img_server.domain.job import Job
from img2img_server.errors import UnavailableError
from img2img_server.nats.bus import Bus
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_webhooks import MemoryWebhookOutbox
from img2img_server.webhooks.dispatcher import BackoffPolicy
from img2img_server.webhooks.sender import webhook_sender
from img2img_server.webhooks.signature import Signer
from tests.stack import (
    DEV,
    WAIT_SECONDS,
    Api,
    refusal,
    running_api,
    running_worker,
    settings,
    spec,
)

LOCAL = settings(outbound_allow="127.0.0.1")
FAST = BackoffPolicy(delays_seconds=(0.02,) * 7)


@asynccontextmanager
async def api_that_delivers(
    bus: Bus,
    *,
    pauses: BackoffPolicy = FAST,
    allow: str = "127.0.0.1",
    timeout_seconds: float = 30.0,
) -> AsyncIterator[Api]:
    """Yields an api that sends its webhooks."""
    policy = OutboundPolicy.parse(allow)
    names = Names("127.0.0.1")
    post = webhook_sender(policy, timeout_seconds=timeout_seconds, resolver=names)
    webhooks = Webhooks(post, Signer(SECRET), pauses)
    async with running_api(bus, LOCAL, webhooks=webhooks) as api:
        yield api


async def run_to_end(api: Api, **changes: Any) -> job_pb2.Job:
    """Returns a job's record from its terminal event. The webhook may arrive before this event."""
    async for message in api.generate(spec(**changes)):
        event = message.event
    return without_status(getattr(event, event.WhichOneof("event")).job)


def without_status(job: job_pb2.Job) -> job_pb2.Job:
    same = job_pb2.Job()
    same.CopyFrom(job)
    same.webhook_status = same.webhook_error = ""
    return same


async def status_becomes(api: Api, name: str, wanted: str) -> None:
    async def status() -> str:
        return (await api.get(name)).webhook_status

    await until(status, wanted)


async def test_a_signed_webhook_tells_what_fetch_tells(bus: Bus) -> None:
    async with receiving() as receiver, running_worker(bus), api_that_delivers(bus) as api:
        ended = await run_to_end(api, webhook=receiver.url, track_id="order-77")
        got = await receiver.next()
        found = Webhook(SECRET).verify(got.body, got.headers)
        assert got.headers["webhook-id"] == f"msg_{ended.id}"
        assert got.headers["Content-Type"] == "application/json"
        assert found["meta"]["webhook"] == receiver.url
        assert len(found.pop("meta")) == 28
        assert found == {
            "status": "success",
            "id": ended.id,
            "output": list(ended.future_urls),
            "proxy_links": list(ended.future_urls),
            "generationTime": round(ended.timings.engine.ToNanoseconds() / 1e9, 2),
            "track_id": "order-77",
            "nsfw_content_detected": False,
            "warning": "",
        }
        await status_becomes(api, ended.name, "success")
        assert without_status(await api.get(ended.name)) == ended


async def test_a_receiver_that_is_down_three_times_gets_it_at_last(bus: Bus) -> None:
    async with (
        receiving(500, 404, 302, 204) as receiver,
        running_worker(bus),
        api_that_delivers(bus) as api,
    ):
        ended = await run_to_end(api, webhook=receiver.url)
        attempts = [await receiver.next() for _ in range(4)]
        assert len({attempt.body for attempt in attempts}) == 1
        assert {attempt.headers["webhook-id"] for attempt in attempts} == {f"msg_{ended.id}"}
        for attempt in attempts:
            Webhook(SECRET).verify(attempt.body, attempt.headers)
        await status_becomes(api, ended.name, "success")
        assert without_status(await api.get(ended.name)) == ended
        assert receiver.arrived.empty()


async def test_between_attempts_the_job_says_retrying() -> None:
    bus = memory_bus()
    async with (
        receiving(500) as receiver,
        running_worker(bus),
        api_that_delivers(bus, pauses=BackoffPolicy()) as api,
    ):
        ended = await run_to_end(api, webhook=receiver.url)
        await receiver.next()
        await status_becomes(api, ended.name, "retrying")
        retried = await api.get(ended.name)
        assert retried.webhook_error == "the server answered 500"
        assert without_status(retried) == ended


async def test_after_the_last_attempt_the_job_says_failed_and_is_the_same() -> None:
    bus = memory_bus()
    async with receiving(500) as receiver, running_worker(bus), api_that_delivers(bus) as api:
        ended = await run_to_end(api, webhook=receiver.url)
        await status_becomes(api, ended.name, "failed")
        assert receiver.arrived.qsize() == 8
        now = await api.get(ended.name)
        assert (now.state, without_status(now)) == (job_pb2.Job.STATE_SUCCEEDED, ended)


async def test_gone_ends_the_attempts() -> None:
    bus = memory_bus()
    async with receiving(410) as receiver, running_worker(bus), api_that_delivers(bus) as api:
        ended = await run_to_end(api, webhook=receiver.url)
        await status_becomes(api, ended.name, "failed")
        assert receiver.arrived.qsize() == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_holds_the_next_attempt_back(status: int) -> None:
    bus = memory_bus()
    asked = (status, {"Retry-After": "3000"})
    async with receiving(asked, 200) as receiver, running_worker(bus):
        async with api_that_delivers(bus) as api:
            ended = await run_to_end(api, webhook=receiver.url)
            await receiver.next()
            await status_becomes(api, ended.name, "retrying")
        assert await bus.outbox.pull(1, 0.3) == []  # The table of delays alone would give 0.02 s.


async def test_a_slow_receiver_holds_up_neither_the_job_nor_other_webhooks(bus: Bus) -> None:
    async with (
        receiving(held=True) as slow,
        receiving() as quick,
        running_worker(bus),
        api_that_delivers(bus, timeout_seconds=0.5) as api,
    ):
        late = await run_to_end(api, webhook=slow.url)
        await slow.next()
        # The second webhook is delivered while the first one still waits for the slow receiver.
        prompt = await run_to_end(api, webhook=quick.url)
        await quick.next()
        await status_becomes(api, prompt.name, "success")
        await slow.next()  # The first attempt has timed out, and this is the second one.
        slow.may_answer.set()
        await status_becomes(api, late.name, "success")
        assert without_status(await api.get(late.name)) == late


async def test_what_an_api_leaves_behind_the_next_one_delivers(open_bus: OpenBus) -> None:
    async with open_bus() as worker_bus, receiving(500, 200) as receiver:
        async with running_worker(worker_bus), open_bus() as bus:
            later = BackoffPolicy(delays_seconds=(1.0,) * 7)
            async with api_that_delivers(bus, pauses=later) as first:
                ended = await run_to_end(first, webhook=receiver.url)
                failed = await receiver.next()
                await status_becomes(first, ended.name, "retrying")
        assert receiver.arrived.empty()
        async with open_bus() as bus, api_that_delivers(bus) as second:
            delivered = await receiver.next()
            assert delivered.body == failed.body
            await status_becomes(second, ended.name, "success")
            assert without_status(await second.get(ended.name)) == ended


async def test_a_webhook_waits_in_the_outbox_while_no_api_runs(open_bus: OpenBus) -> None:
    async with open_bus() as bus, receiving() as receiver:
        engine = FakeEngine(hold_after=1)
        async with running_worker(bus, engine) as worker:
            async with api_that_delivers(bus) as first:
                job = await first.create(spec(webhook=receiver.url))
                async for message in first.watch(job.name):
                    if message.event.WhichOneof("event") == "step":
                        break
            engine.release()
            await worker.drained()
        assert receiver.arrived.empty()
        async with open_bus() as other, api_that_delivers(other) as second:
            assert json.loads((await receiver.next()).body)["status"] == "success"
            await status_becomes(second, job.name, "success")


async def test_cancelled_and_failed_jobs_tell_too(bus: Bus) -> None:
    async with receiving() as receiver, api_that_delivers(bus) as api:
        async with running_worker(bus) as worker:
            await worker.drained()
        queued = await api.create(spec(webhook=receiver.url, track_id="q"))
        await api.cancel(queued.name)
        assert json.loads((await receiver.next()).body) == {
            "status": "failed",
            "id": queued.id,
            "message": "Cancelled",
            "output": [],
            "track_id": "q",
        }
        cleared = await api.create(spec(webhook=receiver.url))
        admin = admin_service_pb2_grpc.AdminServiceStub(api.channel)
        await admin.ClearQueue(admin_service_pb2.ClearQueueRequest(), metadata=DEV)
        found = json.loads((await receiver.next()).body)
        assert (found["id"], found["message"]) == (cleared.id, "Queue cleared")
        engine = FakeEngine(hold_after=1)
        async with running_worker(bus, engine):
            running = await api.create(spec(webhook=receiver.url))
            async for message in api.watch(running.name):
                if message.event.WhichOneof("event") == "step":
                    await api.cancel(running.name)
                    engine.release()
            found = json.loads((await receiver.next()).body)
            assert (found["id"], found["message"]) == (running.id, "Cancelled")
        async with running_worker(bus, FakeEngine(), name="w2"):
            failed = await api.create(spec(prompt="fail:the lamp broke", webhook=receiver.url))
            found = json.loads((await receiver.next()).body)
            assert (found["id"], found["status"]) == (failed.id, "failed")
            assert found["message"] == "Processing failed: the lamp broke"


class FailsOnce(MemoryWebhookOutbox):
    """An outbox that is unavailable at the first call."""

    failed = False

    async def put(self, job: Job, *, again: bool = False) -> None:
        if not self.failed:
            self.failed = True
            raise UnavailableError
        await super().put(job, again=again)


async def test_a_job_that_ended_without_its_webhook_gets_it_from_the_next_worker() -> None:
    bus = replace(memory_bus(ack_wait_seconds=0.3), outbox=FailsOnce())
    async with receiving() as receiver, running_worker(bus), api_that_delivers(bus) as api:
        ended = await run_to_end(api, webhook=receiver.url)
        assert json.loads((await receiver.next()).body)["id"] == ended.id
        await status_becomes(api, ended.name, "success")
        assert without_status(await api.get(ended.name)) == ended


async def test_a_cancellation_without_its_webhook_is_completed_by_a_worker() -> None:
    bus = replace(memory_bus(), outbox=FailsOnce())
    async with receiving() as receiver, api_that_delivers(bus) as api:
        async with running_worker(bus) as worker:
            await worker.drained()
        job = await api.create(spec(webhook=receiver.url))
        with pytest.raises(grpc.aio.AioRpcError):
            await api.cancel(job.name)
        async with running_worker(bus):
            found = json.loads((await receiver.next()).body)
            assert (found["id"], found["message"]) == (job.id, "Cancelled")


async def redeliver(api: Api, name: str) -> job_pb2.Job:
    request = service_pb2.RedeliverWebhookRequest(name=name)
    response = await api.stub.RedeliverWebhook(request, metadata=DEV, timeout=WAIT_SECONDS)
    return response.job


async def test_a_webhook_is_delivered_again_on_request(bus: Bus) -> None:
    async with receiving(410, 200) as receiver, running_worker(bus), api_that_delivers(bus) as api:
        ended = await run_to_end(api, webhook=receiver.url)
        first = await receiver.next()
        await status_becomes(api, ended.name, "failed")
        assert (await redeliver(api, ended.name)).webhook_status == "failed"
        second = await receiver.next()
        assert (second.body, second.headers["webhook-id"]) == (
            first.body,
            first.headers["webhook-id"],
        )
        await status_becomes(api, ended.name, "success")


async def test_redelivery_is_refused_where_there_is_nothing_to_deliver() -> None:
    bus = replace(memory_bus(), outbox=MemoryWebhookOutbox(limit=0))
    engine = FakeEngine(hold_after=1)
    async with running_worker(bus, engine), api_that_delivers(bus) as api:
        waiting = await api.create(spec(webhook="https://hooks.example.org/a"))
        reasons = {}
        for name in ("jobs/10999999", waiting.name):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await redeliver(api, name)
            reasons[name] = (caught.value.code(), refusal(caught.value).reason)
        engine.release()
        ended = await run_to_end(api)
        await status_becomes(api, waiting.name, "failed")  # The outbox is full.
        for name in (ended.name, waiting.name):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await redeliver(api, name)
            reasons[name + " ended"] = (caught.value.code(), refusal(caught.value).reason)
        assert list(reasons.values()) == [
            (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND"),
            (grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_ENDED"),
            (grpc.StatusCode.FAILED_PRECONDITION, "NO_WEBHOOK"),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WEBHOOKS"),
        ]


WHY_PRIVATE = (
    "the address is not public",
    "the name internal.test cannot be resolved",
    "the host is an IP address in a spelling that is not accepted",
)


@pytest.mark.parametrize(
    "address",
    [
        "https://127.0.0.1:{port}/",
        "https://localhost:{port}/",
        "https://internal.test:{port}/",
        "https://2130706433:{port}/",
    ],
)
async def test_a_private_address_is_a_failed_attempt_without_a_connection(address: str) -> None:
    bus = memory_bus()
    async with (
        listening() as listener,
        running_worker(bus),
        api_that_delivers(bus, allow="", pauses=BackoffPolicy()) as api,
    ):
        ended = await run_to_end(api, webhook=address.format(port=listener.port))
        await status_becomes(api, ended.name, "retrying")
        assert ended.state == job_pb2.Job.STATE_SUCCEEDED
        assert listener.connections == 0
        found = (await api.get(ended.name)).webhook_error
        assert found in WHY_PRIVATE


async def test_a_redirect_is_not_followed() -> None:
    bus = memory_bus()
    async with receiving() as target, running_worker(bus):
        redirected = (307, {"Location": target.url})
        async with (
            receiving(redirected, 200) as receiver,
            api_that_delivers(bus) as api,
        ):
            ended = await run_to_end(api, webhook=receiver.url)
            await receiver.next()
            await receiver.next()
            await status_becomes(api, ended.name, "success")
            assert (await api.get(ended.name)).webhook_error == ""
            assert target.arrived.empty()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_the_job_says_that_redirects_of_webhooks_are_not_followed(status: int) -> None:
    bus = memory_bus()
    redirected = (status, {"Location": "https://hooks.example.org/"})
    async with (
        receiving(redirected) as receiver,
        running_worker(bus),
        api_that_delivers(bus, pauses=BackoffPolicy()) as api,
    ):
        ended = await run_to_end(api, webhook=receiver.url)
        await status_becomes(api, ended.name, "retrying")
        found = (await api.get(ended.name)).webhook_error
        assert found == f"the server answered {status}; redirects are not followed"


async def test_a_webhook_is_posted_to_the_bytes_that_the_caller_sent() -> None:
    bus = memory_bus()
    async with origin(answer(204)) as server, running_worker(bus), api_that_delivers(bus) as api:
        url = f"http://127.0.0.1:{server.port}/a%28b%29?sig=%2f%2B%3a~&e=&x"
        ended = await run_to_end(api, webhook=url)
        await status_becomes(api, ended.name, "success")
        assert server.targets == ["/a%28b%29?sig=%2f%2B%3a~&e=&x HTTP/1.1"]


async def test_a_stopping_api_finishes_the_attempt_under_way() -> None:
    bus = memory_bus()
    async with receiving(held=True) as receiver, running_worker(bus):
        async with api_that_delivers(bus) as api:
            ended = await run_to_end(api, webhook=receiver.url)
            await receiver.next()
            api.stop.set()
            receiver.may_answer.set()
        stored = await bus.jobs.get("dev", ended.id)
        assert stored is not None
        assert stored.job.webhook_status == "success"
        assert await bus.outbox.pull(1, 0.01) == []


async def test_many_webhooks_of_one_moment_all_arrive(bus: Bus) -> None:
    async with receiving() as receiver, running_worker(bus), api_that_delivers(bus) as api:
        ended = await asyncio.gather(*(run_to_end(api, webhook=receiver.url) for _ in range(3)))
        ids = {json.loads((await receiver.next()).body)["id"] for _ in ended}
        assert ids == {job.id for job in ended}
