"""The gRPC service as callers see it: real gRPC, a worker with the fake engine."""

import asyncio
import io
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_server.api import service
from img2img_server.api.deps import service_limits
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.domain.models import WorkerInfo
from img2img_server.imaging import decoder
from img2img_server.imaging.base import CheckedImage
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine, FixedSafetyChecker
from img2img_server.testing.memory_events import MemoryEventLog
from tests.stack import (
    DEV,
    WAIT_SECONDS,
    kinds,
    known_model,
    photo,
    read_until,
    refusal,
    running_api,
    running_stack,
    running_worker,
    settings,
    spec,
    two_tenants,
)


async def test_generate_streams_from_the_snapshot_to_the_stored_link() -> None:
    async with running_stack() as stack:
        messages = [m async for m in stack.api.generate(spec(strength=0.5))]
        blobs = stack.worker.blobs
        assert kinds(messages) == [
            "snapshot",
            "queued",
            "started",
            "stage",
            "stage",
            "step",
            "step",
            "stage",
            "stage",
            "sample_finished",
            "sample_stored",
            "succeeded",
        ]
        numbers = [m.event.sequence for m in messages]
        assert numbers == list(range(12))
        stages = event_pb2.StageFinished
        assert [message.event.stage for message in messages[7:9]] == [
            stages(stage=stages.STAGE_IMAGE_DECODED, sample=0),
            stages(stage=stages.STAGE_SAFETY_CHECKED, sample=0),
        ]
        job = messages[-1].event.succeeded.job
        assert job.state == job_pb2.Job.STATE_SUCCEEDED
        assert job.samples[0].url == job.future_urls[0] == messages[-2].event.sample_stored.url
        assert job.timings.steps == 2
        key = job.samples[0].url.split("/", 3)[3]
        info = await blobs.stat(key)
        assert info is not None
        assert (info.media_type, info.size_bytes) == ("image/png", job.samples[0].size_bytes)


async def test_the_image_is_sent_before_it_is_stored_in_the_asked_format() -> None:
    async with running_stack() as stack:
        for number, media_type in (
            (job_pb2.IMAGE_FORMAT_UNSPECIFIED, "image/jpeg"),
            (job_pb2.IMAGE_FORMAT_PNG, "image/png"),
            (job_pb2.IMAGE_FORMAT_WEBP, "image/webp"),
        ):
            call = stack.api.generate(spec(output_format=number))
            messages = [m async for m in call]
            image = messages[-3].event.sample_finished.image
            assert (image.media_type, image.width, image.height) == (media_type, 256, 256)
            assert image.size_bytes == len(image.data) > 100


async def test_the_same_seed_gives_the_same_image_and_samples_count_up() -> None:
    async with running_stack() as stack:

        async def images(**changes: object) -> dict[int, str]:
            call = stack.api.generate(spec(output_format=job_pb2.IMAGE_FORMAT_PNG, **changes))
            return {
                m.event.sample_finished.seed: m.event.sample_finished.image.sha256
                async for m in call
                if m.event.HasField("sample_finished")
            }

        first = await images(seed=7, samples=2)
        assert sorted(first) == [7, 8]
        assert first[7] != first[8]
        assert await images(seed=8) == {8: first[8]}
        wrapped = await images(seed=2**32 - 1, samples=2)
        assert sorted(wrapped) == [0, 2**32 - 1]


async def test_an_absent_seed_is_drawn_once_and_returned() -> None:
    async with running_stack() as stack:
        request = spec()
        request.ClearField("seed")
        jobs = [await stack.api.create(request) for _ in range(2)]
        assert jobs[0].spec.seed != jobs[1].spec.seed
        ended = await read_until(stack.api.watch(jobs[0].name), "succeeded")
        assert ended[-1].event.succeeded.job.samples[0].seed == jobs[0].spec.seed


async def test_defaults_are_filled_in_and_the_image_is_not_returned() -> None:
    async with running_stack() as stack:
        request = job_pb2.JobSpec(prompt="a cat", init_image=spec().init_image, seed=3)
        job = await stack.api.create(request)
        assert (job.spec.width, job.spec.height, job.spec.samples) == (512, 512, 1)
        assert (job.spec.strength, job.spec.safety_checker) == (0.7, True)
        assert (job.spec.model, job.spec.scheduler) == ("fake", "ddim")
        assert (job.spec.num_inference_steps, job.spec.guidance_scale) == (4, 1.0)
        assert not job.spec.HasField("init_image")
        assert job.id >= 10_000_001


async def test_a_watch_resumes_without_gap_or_duplicate() -> None:
    async with running_stack(FakeEngine(hold_after=2)) as stack:
        job = await stack.api.create(spec(strength=1.0))
        first = await read_until(stack.api.watch(job.name), "step")
        seen = first[-1].event.sequence
        stack.worker.engine.release()
        rest = [m async for m in stack.api.watch(job.name, after=seen)]
        assert kinds(rest)[0] == "snapshot"
        assert rest[0].event.sequence == seen
        numbers = [m.event.sequence for m in [*first[1:], *rest[1:]]]
        assert numbers == list(range(1, len(numbers) + 1))
        assert kinds(rest)[-1] == "succeeded"


async def test_a_watch_of_an_ended_job_replays_it_and_ends() -> None:
    async with running_stack() as stack:
        live = [m async for m in stack.api.generate(spec())]
        replay = [m async for m in stack.api.watch(live[0].event.job)]
        assert replay[0].event.snapshot.job.state == job_pb2.Job.STATE_SUCCEEDED
        assert [m.event for m in replay[1:]] == [m.event for m in live[1:]]


async def test_a_watch_of_an_ended_job_does_not_take_over_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_stack() as stack:
        messages = [message async for message in stack.api.generate(spec())]
        monkeypatch.delattr(MemoryEventLog, "open")
        assert kinds([m async for m in stack.api.watch(messages[0].event.job)]) == kinds(messages)


async def test_previews_come_when_asked_for() -> None:
    async with running_stack() as stack:
        messages = [
            m async for m in stack.api.generate(spec(strength=1.0, preview_interval_steps=2))
        ]
        previews = [m.event.preview for m in messages if m.event.HasField("preview")]
        assert [preview.step for preview in previews] == [2]
        assert max(previews[0].image.width, previews[0].image.height) <= 256


async def test_two_callers_at_once_see_only_their_own_jobs() -> None:
    async with running_stack() as stack:

        async def one(seed: int) -> set[str]:
            return {m.event.job async for m in stack.api.generate(spec(seed=seed))}

        names = await asyncio.gather(*(one(seed) for seed in range(6)))
        assert all(len(found) == 1 for found in names)
        assert len(set.union(*names)) == 6


async def test_a_queued_job_is_cancelled_at_once_and_leaves_the_queue() -> None:
    bus = memory_bus()
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus) as api:
        job = await api.create(spec())
        cancelled = await api.cancel(job.name)
        assert cancelled.state == job_pb2.Job.STATE_CANCELLED
        messages = [m async for m in api.watch(job.name)]
        assert kinds(messages) == ["snapshot", "queued", "cancelled"]
        assert (await api.cancel(job.name)).state == job_pb2.Job.STATE_CANCELLED
    async with running_worker(bus, name="w2") as worker:
        assert await bus.queue.depth("fake", "realtime") == 0


async def test_a_running_job_is_cancelled_at_its_next_step() -> None:
    async with running_stack(FakeEngine(hold_after=1)) as stack:
        call = stack.api.generate(spec(strength=1.0))
        messages = await read_until(call, "step")
        asked = await stack.api.cancel(messages[0].event.job)
        assert asked.state in (job_pb2.Job.STATE_RUNNING, job_pb2.Job.STATE_CANCELLED)
        assert kinds([m async for m in call]) == ["cancelled"]
        job = await stack.api.get(messages[0].event.job)
        assert job.state == job_pb2.Job.STATE_CANCELLED


async def test_an_ended_job_cannot_be_cancelled() -> None:
    async with running_stack() as stack:
        messages = [m async for m in stack.api.generate(spec())]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.cancel(messages[0].event.job)
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED")


async def test_who_has_seen_more_than_there_is_gets_the_end_of_an_ended_job() -> None:
    async with running_stack() as stack:
        seen = [m async for m in stack.api.generate(spec())]
        for after in (seen[-1].event.sequence, 2**63 - 1):
            again = [m async for m in stack.api.watch(seen[0].event.job, after=after)]
            assert kinds(again) == ["snapshot", "succeeded"]
            assert again[-1].event.sequence == min(after + 1, 2**63 - 1)


@pytest.mark.parametrize(
    ("detach", "state"),
    [(False, job_pb2.Job.STATE_CANCELLED), (True, job_pb2.Job.STATE_SUCCEEDED)],
)
async def test_hanging_up_cancels_after_the_grace_period_unless_detached(
    detach: bool, state: int
) -> None:
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    config = settings(disconnect_grace_seconds=0.05)
    async with running_worker(bus, engine), running_api(bus, config) as api:
        call = api.generate(spec(strength=1.0), detach=detach)
        name = (await read_until(call, "step"))[0].event.job
        call.cancel()
        if detach:
            engine.release()
        await api.reaches(name, state)
        ended = [m async for m in api.watch(name)]
        assert kinds(ended)[-1] == ("succeeded" if detach else "cancelled")


async def test_a_stopping_api_lets_watchers_resume_on_another_one() -> None:
    bus = memory_bus()
    engine = FakeEngine(hold_after=2)
    async with running_worker(bus, engine):
        async with running_api(bus) as old:
            call = old.generate(spec(strength=1.0))
            first = await read_until(call, "step")
            old.stop.set()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_until(call, "succeeded", into=first)
            found = refusal(caught.value)
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
            assert found.retry_seconds
        async with running_api(bus) as new:
            engine.release()
            last = first[-1].event.sequence
            rest = [m async for m in new.watch(first[0].event.job, after=last)]
        numbers = [m.event.sequence for m in [*first[1:], *rest[1:]]]
        assert numbers == list(range(1, len(numbers) + 1))
        assert kinds(rest)[-1] == "succeeded"


async def test_a_draining_worker_hands_its_job_back_and_another_makes_the_same_image() -> None:
    bus = memory_bus()
    request = spec(strength=1.0, output_format=job_pb2.IMAGE_FORMAT_PNG)
    async with running_api(bus) as api:
        async with running_worker(bus) as worker:
            undisturbed = [m async for m in api.generate(request)]
            await worker.drained()
        held = FakeEngine(hold_after=2)
        async with running_worker(bus, held, config=settings(drain_seconds=0.0)) as worker:
            call = api.generate(request)
            messages = await read_until(call, "step")
            await worker.drained()
        async with running_worker(bus, name="w2"):
            messages += [m async for m in call]
        again = next(m.event.queued for m in messages[3:] if m.event.HasField("queued"))
        assert again.requeue_reason == "worker stopped"
        assert kinds(messages)[-1] == "succeeded"
        job = messages[-1].event.succeeded.job
        assert (job.worker, job.attempt) == ("w2", 1)
        assert job.samples[0].sha256 == undisturbed[-1].event.succeeded.job.samples[0].sha256


async def test_a_failing_job_ends_its_stream_and_its_neighbour_goes_on() -> None:
    async with running_stack() as stack:
        bad, good = await asyncio.gather(
            read_until(stack.api.generate(spec(prompt="fail:it is broken")), "failed"),
            read_until(stack.api.generate(spec()), "succeeded"),
        )
        error = bad[-1].event.failed.job.error
        assert (error.reason, error.message) == ("ENGINE_FAILED", "it is broken")
        assert kinds(good)[-1] == "succeeded"


async def test_a_flagged_image_becomes_black_with_its_flag_set() -> None:
    async with running_stack(safety=FixedSafetyChecker(0.9)) as stack:
        messages = [m async for m in stack.api.generate(spec())]
        assert messages[-3].event.sample_finished.nsfw
        assert messages[-1].event.succeeded.job.samples[0].nsfw
        unchecked = [m async for m in stack.api.generate(spec(safety_checker=False))]
        assert not unchecked[-1].event.succeeded.job.samples[0].nsfw


async def test_a_request_id_makes_one_job_however_often_it_is_sent() -> None:
    async with running_stack() as stack:
        request_id = str(uuid.uuid4())
        jobs = [await stack.api.create(spec(), request_id=request_id) for _ in range(3)]
        assert len({job.id for job in jobs}) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(spec(prompt="another"), request_id=request_id)
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(spec(), request_id="not a uuid")
        assert refusal(caught.value).violations == {"request_id": "request_id must be a UUID"}


@pytest.mark.parametrize(
    ("config", "base", "warned"),
    [
        ({"http_host": "0.0.0.0"}, "http://127.0.0.1:8080", True),
        ({"http_host": "::", "http_port": 81}, "http://[::1]:81", True),
        ({"http_host": "::1"}, "http://[::1]:8080", False),
        ({"http_host": "10.0.0.7"}, "http://10.0.0.7:8080", False),
        (
            {"http_host": "0.0.0.0", "public_base_url": "https://img.example.com/"},
            "https://img.example.com",
            False,
        ),
    ],
)
async def test_links_of_grpc_callers_never_name_an_address_that_is_only_listened_on(
    config: dict[str, Any], base: str, warned: bool
) -> None:
    bus = memory_bus()
    async with running_worker(bus) as worker:
        await worker.drained()
    with capture_logs() as logs:
        async with running_api(bus, settings(**config)) as api:
            job = await api.create(spec())
    assert job.future_urls[0].rpartition("/generations/")[0] == base
    warnings = [line for line in logs if line["event"] == "links_for_this_machine_only"]
    assert bool(warnings) == warned
    assert all("IMG2IMG_PUBLIC_BASE_URL is not set" in line["reason"] for line in warnings)


async def test_the_log_line_of_a_refusal_names_tenant_key_and_reason_and_no_secret(
    tmp_path: Path,
) -> None:
    key, entry = new_key("shop", [])
    (tmp_path / "keys.toml").write_text(entry)
    ring = KeyRing(tmp_path / "keys.toml", dev_key=False)
    bus = memory_bus(queue_limit=1)
    async with running_worker(bus) as worker:
        await worker.drained()
    with capture_logs() as logs:
        async with running_api(bus, settings(queue_limit=1), keys=ring) as api:
            for secret in (key, key, "i2i_unknown"):
                request = service_pb2.CreateJobRequest(spec=spec(prompt="a secret garden"))
                with suppress(grpc.aio.AioRpcError):
                    await api.stub.CreateJob(
                        request, metadata=(("authorization", f"Bearer {secret}"),)
                    )
    served, refused, stranger = [line for line in logs if line["event"] == "rpc"]
    who = {"tenant": "shop", "key_id": ring.authenticate(key).key_id}
    assert who.items() <= served.items()
    assert "reason" not in served
    assert {**who, "code": "RESOURCE_EXHAUSTED", "reason": "QUEUE_FULL"}.items() <= refused.items()
    assert (stranger["reason"], stranger["peer"][:14]) == ("INVALID_API_KEY", "ipv4:127.0.0.1")
    assert "tenant" not in stranger
    assert not any(word in str(logs) for word in (key, "i2i_unknown", "secret garden"))


async def test_a_full_queue_refuses_at_once_with_a_retry_hint() -> None:
    bus = memory_bus(queue_limit=2)
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus, settings(queue_limit=2)) as api:
        for _ in range(2):
            await api.create(spec())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec())
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert found.retry_seconds == 30.0
        listed = await api.stub.ListJobs(service_pb2.ListJobsRequest(), metadata=DEV)
        assert len(listed.jobs) == 2  # The rejected request has created nothing.


async def test_the_jobs_of_a_tenant_count_together_whatever_their_lane() -> None:
    bus = memory_bus(queue_limit=2)
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus, settings(queue_limit=2)) as api:
        await api.create(spec())
        batch = await api.create(spec(lane=job_pb2.LANE_BATCH))
        for lane in (job_pb2.LANE_BATCH, job_pb2.LANE_REALTIME):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.create(spec(lane=lane))
            assert refusal(caught.value).reason == "QUEUE_FULL"
        await api.stub.CancelJob(service_pb2.CancelJobRequest(name=batch.name), metadata=DEV)
        await api.create(spec())


async def test_a_full_queue_refuses_before_the_init_image_is_fetched_or_decoded() -> None:
    fetched = []

    async def fetch(url: str) -> bytes:
        fetched.append(url)
        return photo()

    bus = memory_bus(queue_limit=1)
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus, settings(queue_limit=1), fetch=fetch) as api:
        url = job_pb2.InitImage(url="https://files.example.org/harbour.png")
        await api.create(spec(init_image=url))
        broken = job_pb2.InitImage(data=b"no picture")
        for image in (url, broken):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.create(spec(init_image=image))
            assert refusal(caught.value).reason == "QUEUE_FULL"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec(width=5, init_image=broken))
        assert set(refusal(caught.value).violations) == {"width"}  # Fields are checked first.
    assert len(fetched) == 1


async def test_a_large_file_is_not_decoded_for_a_full_queue_or_with_wrong_fields(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded: list[int] = []
    real = decoder.check_image

    def check(data: bytes, **rest: Any) -> CheckedImage:
        decoded.append(len(data))
        return real(data, **rest)

    monkeypatch.setattr(decoder, "check_image", check)
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    large = job_pb2.InitImage(data=buffer.getvalue())
    bus = memory_bus(queue_limit=1)
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus, settings(queue_limit=1)) as api:
        await api.create(spec(init_image=large))
        assert decoded == [len(large.data)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec(init_image=large))
        assert refusal(caught.value).reason == "QUEUE_FULL"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec(init_image=large, width=5))
        assert refusal(caught.value).reason == "INVALID_REQUEST"
    assert decoded == [len(large.data)]


async def test_requests_whose_callers_hung_up_count_until_they_are_taken_in() -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def fetch(_: str) -> bytes:
        asked.set()
        await answer.wait()
        return photo()

    bus = memory_bus()
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus, settings(max_tenant_calls=1), fetch=fetch) as api:
        slow = spec(init_image=job_pb2.InitImage(url="https://files.example.org/harbour.png"))
        request = service_pb2.CreateJobRequest(spec=slow)
        labels = {"method": "CreateJob", "code": "CANCELLED"}
        before = REGISTRY.get_sample_value("img2img_rpcs_total", labels) or 0.0
        call = api.stub.CreateJob(request, metadata=DEV)
        await asked.wait()
        call.cancel()
        async with asyncio.timeout(WAIT_SECONDS):
            # The call counts until the api has noticed its end, which only the metric shows.
            while (REGISTRY.get_sample_value("img2img_rpcs_total", labels) or 0.0) == before:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec())
        assert refusal(caught.value).reason == "TOO_MANY_CALLS"
        answer.set()
        listing = service_pb2.ListJobsRequest()
        async with asyncio.timeout(WAIT_SECONDS):
            while not (await api.stub.ListJobs(listing, metadata=DEV)).jobs:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await api.create(spec())


async def test_a_repeated_request_finds_its_job_in_a_full_queue() -> None:
    bus = memory_bus(queue_limit=1)
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus, settings(queue_limit=1)) as api:
        one, other = str(uuid.uuid4()), str(uuid.uuid4())
        first = await api.create(spec(), request_id=one)
        assert (await api.create(spec(), request_id=one)).id == first.id
        for _ in range(2):  # The rejected request was not stored.
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.create(spec(), request_id=other)
            assert refusal(caught.value).reason == "QUEUE_FULL"
        await api.cancel(first.name)
        assert (await api.create(spec(), request_id=other)).id != first.id


async def test_a_request_id_is_free_again_when_the_queue_refused_its_job() -> None:
    # The api's cached number is smaller, so only the queue itself rejects the job.
    bus = memory_bus(queue_limit=1)
    async with running_worker(bus) as worker:
        await worker.drained()
    async with running_api(bus, settings(queue_limit=2)) as api:
        first, request_id = await api.create(spec()), str(uuid.uuid4())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec(), request_id=request_id)
        assert refusal(caught.value).reason == "QUEUE_FULL"
        await api.cancel(first.name)
        await api.create(spec(), request_id=request_id)


async def test_jobs_are_listed_newest_first_in_pages_by_state() -> None:
    async with running_stack() as stack:
        names = []
        for _ in range(5):
            messages = await read_until(stack.api.generate(spec()), "succeeded")
            names.append(messages[0].event.job)
        found, token = [], ""
        while True:
            request = service_pb2.ListJobsRequest(page_size=2, page_token=token)
            page = await stack.api.stub.ListJobs(request, metadata=DEV)
            found.append([job.name for job in page.jobs])
            token = page.next_page_token
            if not token:
                break
        newest = names[::-1]
        assert found == [newest[:2], newest[2:4], newest[4:]]
        request = service_pb2.ListJobsRequest(states=[job_pb2.Job.STATE_FAILED])
        assert not (await stack.api.stub.ListJobs(request, metadata=DEV)).jobs
        bad = service_pb2.ListJobsRequest(page_size=101, page_token="?")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.stub.ListJobs(bad, metadata=DEV)
        assert set(refusal(caught.value).violations) == {"page_size", "page_token"}


async def test_a_flood_of_lists_reads_one_page_at_a_time_and_is_refused_beyond_fifty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, most, released = 0, 0, asyncio.Event()

    async def page_of(*_: object) -> tuple[list[Any], int]:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        await released.wait()
        reading -= 1
        return [], 0

    monkeypatch.setattr(service, "page_of", page_of)
    async with running_api(memory_bus()) as api:

        async def listed() -> str:
            try:
                await api.stub.ListJobs(service_pb2.ListJobsRequest(), metadata=DEV)
            except grpc.aio.AioRpcError as error:
                released.set()  # The others end once the first is refused.
                return refusal(error).reason
            return "OK"

        reasons = await asyncio.gather(*(listed() for _ in range(60)))
    assert most == 1
    assert set(reasons) == {"OK", "SERVER_BUSY"}
    assert reasons.count("OK") >= 51


async def test_capabilities_tell_the_validators_own_limits() -> None:
    async with running_stack() as stack:
        request = service_pb2.GetCapabilitiesRequest()
        found = await stack.api.stub.GetCapabilities(request, metadata=DEV)
        limits = service_limits(settings())
        assert found.limits.max_side_pixels == limits.max_side_pixels
        assert found.limits.max_prompt_characters == limits.max_prompt_characters
        assert found.limits.max_image_bytes == limits.max_image_bytes
        assert found.limits.max_queued_jobs == settings().queue_limit
        assert [(m.name, m.workers, m.device) for m in found.models] == [("fake", 1, "fake")]


async def test_a_key_learns_its_tenant_and_its_permissions(tmp_path: Path) -> None:
    manager, entry = new_key("shop", ["unsafe", "manage"])
    plain, plain_entry = new_key("press", [])
    file = tmp_path / "keys.toml"
    file.write_text(f"{entry}\n{plain_entry}")
    async with running_api(memory_bus(), keys=KeyRing(file, dev_key=False)) as api:

        async def caller(key: str) -> service_pb2.GetCallerResponse:
            metadata = (("authorization", f"Bearer {key}"),)
            return await api.stub.GetCaller(service_pb2.GetCallerRequest(), metadata=metadata)

        found = await caller(manager)
        assert found.tenant == "shop"
        assert found.permissions == ["manage", "operate", "storage", "unsafe"]
        other = await caller(plain)
        assert (other.tenant, list(other.permissions)) == ("press", [])
        assert found.key_id
        assert found.key_id not in (other.key_id, manager)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await caller("i2i_unknown")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_job_belongs_to_its_tenant(tmp_path: Path) -> None:
    ring, key_a, key_b = two_tenants(tmp_path)
    bus = memory_bus()
    async with running_worker(bus), running_api(bus, keys=ring) as api:

        def meta(key: str) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {key}"),)

        create = service_pb2.CreateJobRequest(spec=spec())
        job = (await api.stub.CreateJob(create, metadata=meta(key_a))).job
        get = service_pb2.GetJobRequest(name=job.name)
        assert (await api.stub.GetJob(get, metadata=meta(key_a))).job.id == job.id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.stub.GetJob(get, metadata=meta(key_b))
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
        unsafe = service_pb2.CreateJobRequest(spec=spec(safety_checker=False))
        await api.stub.CreateJob(unsafe, metadata=meta(key_a))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.stub.CreateJob(unsafe, metadata=meta(key_b))
        assert refusal(caught.value).reason == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "metadata", [(), (("authorization", "Bearer wrong"),), (("authorization", "Basic dev-key"),)]
)
async def test_without_a_valid_key_nothing_is_sent(
    metadata: tuple[tuple[str, str], ...],
) -> None:
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.stub.GetJob(
                service_pb2.GetJobRequest(name="jobs/10000001"), metadata=metadata
            )
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "INVALID_API_KEY")
        call = stack.api.stub.Generate(service_pb2.GenerateRequest(spec=spec()), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert refusal(caught.value).reason == "INVALID_API_KEY"


@pytest.mark.parametrize(
    "name", ["jobs/1", "jobs/x", "jobs/", "", "10000001", "jobs/99999999999999"]
)
async def test_a_strange_name_names_no_job(name: str) -> None:
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.get(name)
        assert refusal(caught.value).reason == "JOB_NOT_FOUND"


async def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(spec(model="nope"))
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "known models: fake" in str(caught.value.details())


@pytest.mark.parametrize(("waiting", "retried"), [(0, False), (3, True)])
async def test_a_deadline_that_cannot_be_met_is_refused_and_retried_only_if_waiting_helps(
    waiting: int, retried: bool
) -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        # A worker that takes 4 s at 512x512 takes 1 s for each of these jobs.
        worker = WorkerInfo(name="w1", model=FAKE_MODEL, device="cpu", job_seconds=4.0)
        await bus.workers.announce(worker)
        for _ in range(waiting):
            await api.create(spec())
        request = service_pb2.GenerateRequest(spec=spec(samples=4 if not waiting else 1))
        call = api.stub.Generate(request, metadata=DEV, timeout=2.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        found = refusal(caught.value)
        assert found.reason == "DEADLINE_TOO_SHORT"
        assert (found.retry_seconds is not None) is retried
        assert not retried or found.retry_seconds >= 1.0


async def test_a_deadline_counts_the_step_that_runs_although_the_caller_asked_for_too_few() -> None:
    bus = memory_bus()
    await known_model(bus)
    async with running_api(bus) as api:
        worker = WorkerInfo(
            name="w1",
            model=FAKE_MODEL,
            device="cpu",
            job_seconds=4.0,
            forward_seconds=400.0,
            job_forward_seconds=400.0,
        )
        await bus.workers.announce(worker)
        request = service_pb2.GenerateRequest(spec=spec(strength=0.04, num_inference_steps=20))
        call = api.stub.Generate(request, metadata=DEV, timeout=20.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert refusal(caught.value).reason == "DEADLINE_TOO_SHORT"


async def test_health_answers_without_a_key() -> None:
    async with running_stack() as stack:
        health = health_pb2_grpc.HealthStub(stack.api.channel)
        request = health_pb2.HealthCheckRequest(service="img2img.v1.Img2ImgService")
        answer = await health.Check(request, timeout=WAIT_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_stranger_is_refused_before_a_large_request_is_read() -> None:
    async with running_stack() as stack:
        # This value exceeds the limit, too.
        large = spec(init_image=job_pb2.InitImage(data=bytes(60 * 2**20)))
        request = service_pb2.CreateJobRequest(spec=large)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.stub.CreateJob(request, metadata=(("authorization", "Bearer no"),))
        assert refusal(caught.value).reason == "INVALID_API_KEY"
        assert kinds([m async for m in stack.api.generate(spec())])[-1] == "succeeded"


async def test_a_job_says_that_its_init_image_was_enlarged() -> None:
    bus = memory_bus()
    await bus.workers.announce(WorkerInfo(name="w", model=FAKE_MODEL, device="cpu"))
    async with running_api(bus) as api:
        small = job_pb2.InitImage(data=photo(16, 12))
        job = await api.create(spec(init_image=small))
        assert job.warning == (
            "init_image has only 16x12 pixels and was enlarged to 256x256: send a larger one for "
            "more details."
        )
