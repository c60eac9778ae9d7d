"""Device seconds of jobs, usage by tenant and day, estimates and prices."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import grpc
import pytest
from fixtures_engines import OpenBus
from prometheus_client import REGISTRY

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc, job_pb2, service_pb2
from img2img_client import Client
from img2img_server import clock, telemetry
from img2img_server.domain.job import Job, SampleResult, State
from img2img_server.domain.models import WorkerInfo
from img2img_server.domain.noise_levels import NoiseLevels
from img2img_server.domain.params import JobParams
from img2img_server.domain.price import Price
from img2img_server.nats.usage import Usage, UsageOfDay
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL
from tests.http_stack import running_gateway
from tests.stack import (
    DEV,
    Api,
    known_model,
    running_api,
    running_worker,
    settings,
    spec,
    two_tenants,
)

PRICED = settings(device_second_price="0.5 EUR")


def ended(tenant: str, device_seconds: float, end_time: float) -> Job:
    return Job(
        id=10_000_001,
        tenant=tenant,
        params=JobParams(prompt="p"),
        file_prefix="f",
        future_urls=(),
        create_time=end_time,
        end_time=end_time,
        state=State.SUCCEEDED,
        samples=(SampleResult(index=0, seed=1), SampleResult(index=1, seed=2)),
        device_seconds=device_seconds,
    )


async def usage(
    api: Api, days: int = 0, metadata: object = DEV
) -> admin_service_pb2.GetUsageResponse:
    stub = admin_service_pb2_grpc.AdminServiceStub(api.channel)
    return await stub.GetUsage(admin_service_pb2.GetUsageRequest(days=days), metadata=metadata)


async def test_sums_of_several_processes_are_added(open_bus: OpenBus) -> None:
    noon = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()
    async with open_bus() as one, open_bus() as two:
        for bus in (one, two):
            bus.usage.note(ended("acme", 1.5, noon))
            bus.usage.note(ended("ac.me", 1.0, noon))
            bus.usage.note(ended("acme", 0.25, noon - 24 * 3600))
        await asyncio.gather(one.usage.close(), two.usage.close())
        today = UsageOfDay(
            day=date(2026, 11, 30),
            tenant="acme",
            usage=Usage(jobs=2, images=4, device_seconds=3.0),
        )
        other = replace(today, tenant="ac.me", usage=Usage(jobs=2, images=4, device_seconds=2.0))
        before = replace(
            today, day=date(2026, 11, 29), usage=Usage(jobs=2, images=4, device_seconds=0.5)
        )
        found = await one.usage.read(today.day, 2)
        assert sorted(found, key=str) == sorted([today, other, before], key=str)
        assert await two.usage.read(today.day, 1, "acme") == [today]
        assert await two.usage.read(today.day, 2, "acme") == [today, before]
        assert await two.usage.read(before.day, 1) == [before]


async def test_the_latest_use_of_a_key_at_several_apis_is_kept(
    open_bus: OpenBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_bus() as one, open_bus() as other:
        for bus, seconds in ((one, 1000.0), (other, 2000.0), (one, 1500.0)):
            monkeypatch.setattr(clock, "now", lambda now=seconds: now)
            bus.key_uses.note("web")
        one.key_uses.note("shop.web_2")
        await asyncio.gather(one.key_uses.close(), other.key_uses.close())
        assert await one.key_uses.read() == {"web": 2000.0, "shop.web_2": 1500.0}
        assert await one.usage.read(date(1970, 1, 1), 1) == []


async def test_a_job_has_its_device_seconds_and_counts_for_its_tenant() -> None:
    bus = memory_bus()
    async with running_api(bus, PRICED) as api:
        async with running_worker(bus) as worker:
            job = await api.create(spec(samples=2))
            job = await api.reaches(job.name, job_pb2.Job.STATE_SUCCEEDED)
            await worker.drained()  # Its sums are written.
        assert job.device_seconds > 0
        found = await usage(api)
        (used,) = found.usage
        assert (used.tenant, used.jobs, used.images) == ("dev", 1, 2)
        assert used.device_seconds == pytest.approx(job.device_seconds)
        assert (used.price, found.currency) == (pytest.approx(0.5 * used.device_seconds), "EUR")
        with Client(api.address, api_key="dev-key") as client:
            reported = await asyncio.to_thread(client.admin.usage, 3)
        assert (reported.usage[0].jobs, reported.currency) == (1, "EUR")
        for days in (-1, 63):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await usage(api, days)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_key_without_operate_sees_its_own_tenant_only(tmp_path: Path) -> None:
    bus = memory_bus()
    now = datetime.now(UTC).timestamp()
    for tenant in ("a", "b"):
        bus.usage.note(ended(tenant, 1.0, now))
    await bus.usage.close()
    ring, key_a, _ = two_tenants(tmp_path)
    async with running_api(bus, keys=ring) as api:
        mine = (("authorization", f"Bearer {key_a}"),)
        assert [used.tenant for used in (await usage(api, 2, mine)).usage] == ["a"]
    async with running_api(bus) as api:
        assert [used.tenant for used in (await usage(api, 2)).usage] == ["a", "b"]


def test_the_metric_names_a_bounded_number_of_tenants() -> None:
    tenants = [str(uuid.uuid4()) for _ in range(300)]
    for tenant in tenants:
        telemetry.count_usage(tenant, 1.0)
    name = "img2img_tenant_device_seconds_total"
    values = [REGISTRY.get_sample_value(name, {"tenant": tenant}) for tenant in tenants]
    named = sum(value is not None for value in values)
    assert named <= 100
    assert (REGISTRY.get_sample_value(name, {"tenant": "other"}) or 0) >= 300 - named


async def test_an_estimate_takes_the_steps_of_a_noise_level_from_the_announced_table() -> None:
    # Half of the noise is reached after a quarter of the schedule.
    levels = NoiseLevels(
        schedulers=FAKE_MODEL.schedulers, schedules=((4, (-1382, 0, 110, 220, 1382)),)
    )
    model = replace(FAKE_MODEL, pixel_step_seconds=1e-6, noise_levels=(levels,))
    spec = job_pb2.JobSpec(
        prompt="a harbour",
        width=512,
        height=256,
        strength=0.5,
        num_inference_steps=20,
        strength_mode=job_pb2.STRENGTH_MODE_NOISE_LEVEL,
    )
    bus = memory_bus()
    await bus.workers.announce(WorkerInfo(name="w", model=model, device="cpu", job_seconds=2.0))
    async with running_api(bus, PRICED) as api:
        request = service_pb2.EstimateJobRequest(spec=spec)
        found = await api.stub.EstimateJob(request, metadata=DEV)
    assert found.denoising_steps == 5
    assert found.device_seconds == pytest.approx(5 * 512 * 256 * 1e-6)
    assert found.price == pytest.approx(0.5 * found.device_seconds)


async def test_an_estimate_has_the_complete_request_and_creates_nothing() -> None:
    bus = memory_bus()
    measured = replace(FAKE_MODEL, pixel_step_seconds=1e-6)
    await bus.workers.announce(WorkerInfo(name="w", model=measured, device="cpu", job_seconds=2.0))
    async with running_api(bus, PRICED) as api:
        wanted = job_pb2.JobSpec(
            prompt="a harbour", width=512, height=256, strength=1.0, num_inference_steps=10
        )
        request = service_pb2.EstimateJobRequest(spec=wanted)
        found = await api.stub.EstimateJob(request, metadata=DEV)
        assert (found.spec.model, found.spec.width, found.spec.height) == ("fake", 512, 256)
        assert found.spec.scheduler
        assert found.device_seconds == pytest.approx(10 * 512 * 256 * 1e-6)
        assert (found.price, found.currency) == (pytest.approx(0.5 * found.device_seconds), "EUR")
        assert (found.position, found.wait.ToSeconds()) == (0, 0)
        # Jobs took 1 s for this size, which is less than the device needs.
        assert found.eta.ToNanoseconds() / 1e9 == pytest.approx(found.device_seconds)
        assert found.denoising_steps == 10
        assert await bus.jobs.list_ids("dev") == []
        assert await bus.permits.count("dev") == 0
        with Client(api.address, api_key="dev-key") as client:
            same = await asyncio.to_thread(
                lambda: client.estimate(
                    "a harbour", width=512, height=256, strength=1.0, num_inference_steps=10
                )
            )
        assert (same.device_seconds, same.currency) == (found.device_seconds, "EUR")
        assert same.denoising_steps == 10
        # No table of the schedules is announced, so the number is not known.
        request.spec.strength_mode = job_pb2.STRENGTH_MODE_NOISE_LEVEL
        found = await api.stub.EstimateJob(request, metadata=DEV)
        assert not found.HasField("denoising_steps")
        for wrong in (job_pb2.JobSpec(), job_pb2.JobSpec(prompt="p", width=5)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await api.stub.EstimateJob(service_pb2.EstimateJobRequest(spec=wrong), metadata=DEV)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "init_image" not in (refused.value.details() or "")


@pytest.mark.parametrize(
    ("fields", "is_open"),
    [({}, True), ({"width": 256}, True), ({"width": 256, "height": 512}, False)],
    ids=["none", "one", "both"],
)
async def test_an_estimate_says_that_an_open_size_is_that_of_a_square(
    fields: dict[str, int], is_open: bool
) -> None:
    bus = memory_bus()
    await bus.workers.announce(WorkerInfo(name="w", model=FAKE_MODEL, device="cpu"))
    async with running_api(bus) as api:
        wanted = job_pb2.JobSpec(prompt="a", **fields)
        for image in (job_pb2.InitImage(), job_pb2.InitImage(data=b"x")):
            if image.data:
                wanted.init_image.CopyFrom(image)
            request = service_pb2.EstimateJobRequest(spec=wanted)
            found = await api.stub.EstimateJob(request, metadata=DEV)
            is_said = "those of a square init image" in found.warning
            assert is_said == (is_open and bool(image.data))


async def test_an_estimate_over_http_is_that_of_the_api() -> None:
    headers = {"Authorization": "Bearer dev-key"}
    async with running_gateway() as gateway:
        sent = {"spec": {"prompt": "a harbour"}}
        answer = await gateway.http.post("/v1/jobs:estimate", json=sent, headers=headers)
        assert answer.status_code == 200
        assert answer.json()["spec"]["prompt"] == "a harbour"
        assert answer.json()["currency"] == ""
        sent = {"spec": {"prompt": "", "nonsense": 1}}
        answer = await gateway.http.post("/v1/jobs:estimate", json=sent, headers=headers)
        assert answer.status_code == 400


async def test_a_model_without_a_measurement_has_no_estimate() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus, PRICED) as api:
        request = service_pb2.EstimateJobRequest(spec=job_pb2.JobSpec(prompt="p"))
        found = await api.stub.EstimateJob(request, metadata=DEV)
        assert (found.device_seconds, found.price, found.currency) == (0.0, 0.0, "")
        assert not found.HasField("eta")


@pytest.mark.parametrize("text", ["1", "1 eur", "EUR", "-1 EUR", "1 EUR "])
def test_a_price_is_a_number_and_a_currency(text: str) -> None:
    with pytest.raises(ValueError, match="currency"):
        Price.parse(text)
    assert Price.parse("0.0004 EUR") == Price(0.0004, "EUR")
    assert Price.parse("") == Price()
