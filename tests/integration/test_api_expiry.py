"""A job exists exactly as long after its end as its links work."""

from __future__ import annotations

import time
from dataclasses import replace

import grpc
import pytest

from img2img.v1 import job_pb2, service_pb2
from img2img_server.interfaces.records import Stored
from img2img_server.nats.bus import Bus
from img2img_server.webhooks.record import SUCCESS, set_status
from tests.http_stack import running_gateway
from tests.stack import DEV, Api, read_until, refusal, running_api, running_worker, spec

HOUR = 3600.0


async def ended_hours_ago(bus: Bus, job_id: int, hours: float) -> Stored:
    """Changes the record so that the job ended in the past."""
    stored = await bus.jobs.get("dev", job_id)
    assert stored is not None
    job = replace(stored.job, end_time=time.time() - hours * HOUR)
    return Stored(job, await bus.jobs.update(job, stored.revision))


async def made(api: Api) -> job_pb2.Job:
    return (await read_until(api.generate(spec()), "succeeded"))[-1].event.succeeded.job


async def listed(api: Api) -> list[str]:
    answer = await api.stub.ListJobs(service_pb2.ListJobsRequest(), metadata=DEV)
    return [job.name for job in answer.jobs]


async def test_a_job_is_unknown_to_every_call_once_its_expire_time_has_passed(bus: Bus) -> None:
    async with running_worker(bus), running_api(bus) as api:
        gone, kept = await made(api), await made(api)
        await ended_hours_ago(bus, gone.id, 24.01)
        await ended_hours_ago(bus, kept.id, 23.9)
        assert await listed(api) == [kept.name]
        assert (await api.get(kept.name)).expire_time.ToSeconds() > time.time()
        redelivery = service_pb2.RedeliverWebhookRequest(name=gone.name)
        calls = [
            api.get(gone.name),
            api.cancel(gone.name),
            read_until(api.watch(gone.name), "succeeded"),
            api.stub.RedeliverWebhook(redelivery, metadata=DEV),
        ]
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert (caught.value.code(), refusal(caught.value).reason) == (
                grpc.StatusCode.NOT_FOUND,
                "JOB_NOT_FOUND",
            )


async def test_a_late_webhook_status_does_not_keep_the_job_known(bus: Bus) -> None:
    async with running_worker(bus), running_api(bus) as api:
        job = await made(api)
        stored = await ended_hours_ago(bus, job.id, 23.999)
        await set_status(bus.jobs, stored.job, SUCCESS)
        await ended_hours_ago(bus, job.id, 24.001)
        # The call succeeds although the file is already deleted.
        await set_status(bus.jobs, stored.job, "failed")
        assert await listed(api) == []


@pytest.mark.parametrize(("legacy", "code"), [(False, 404), (True, 200)])
async def test_fetch_of_an_expired_job_answers_as_for_an_unknown_one(
    legacy: bool, code: int
) -> None:
    async with running_gateway(legacy=legacy) as gateway:
        job = (await gateway.create()).json()
        unknown = await gateway.fetch(19_999_999)
        assert (await gateway.fetch(job["id"])).json()["status"] == "success"
        await ended_hours_ago(gateway.stack.bus, job["id"], 24.01)
        answer = await gateway.fetch(job["id"])
        assert (answer.status_code, answer.json()) == (code, unknown.json())
