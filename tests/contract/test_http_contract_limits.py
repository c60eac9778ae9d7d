"""Rate limits and limits of open calls, over HTTP and gRPC (docs/http-contract.md#limits)."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from receiver import until

from img2img.v1 import service_pb2
from img2img_server.api.admission import MISTAKES
from img2img_server.api.interceptors import OpenCalls
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.domain.job import FIRST_JOB_ID
from img2img_server.domain.models import WorkerInfo
from img2img_server.gateway import upstream
from img2img_server.gateway.http.http_request import MAX_VALUES
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.http_stack import (
    ENTERPRISE,
    PHOTO_URL,
    Gateway,
    body,
    fetch_photo,
    gateway_before,
    running_gateway,
)
from tests.stack import DEV, Api, Stack, kinds, refusal, running_api, running_worker, settings, spec


@asynccontextmanager
async def limited(
    *, keys: KeyRing | None = None, legacy: bool = False, hold: bool = False, **changes: int
) -> AsyncIterator[Gateway]:
    """Yields a gateway and an api with these limits. `hold`: jobs wait after their first step."""
    bus = memory_bus(queue_limit=50)
    engine = FakeEngine(hold_after=1) if hold else FakeEngine()
    async with (
        running_worker(bus, engine) as worker,
        running_api(bus, settings(**changes), fetch=fetch_photo, keys=keys) as api,
        gateway_before(Stack(bus, api, worker), legacy=legacy, **changes) as gateway,
    ):
        yield gateway


def is_left(found: float, seconds: float, began: float) -> bool:
    """Returns whether `found` is the rest of a time of `seconds` that began after `began`."""
    return seconds - (time.monotonic() - began) <= found <= seconds


async def test_a_key_that_makes_jobs_too_fast_is_429_with_when_to_come_back() -> None:
    async with limited(rate_limit=2) as gateway:
        began = time.monotonic()
        for _ in range(2):
            assert (await gateway.create()).json()["status"] == "success"
        refused = await gateway.create()
        wait = int(refused.headers["retry-after"])
        assert refused.status_code == 429
        assert is_left(wait, 30, began)
        assert refused.json() == {
            "status": "error",
            "message": "Rate limit exceeded. Maximum 2 requests per minute allowed.",
            "reason": "RATE_LIMITED",
            "retry_after": wait,
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stack.api.create(spec())
        found = refusal(caught.value)
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert found.retry_seconds is not None
        assert is_left(found.retry_seconds, 30, began)


async def test_a_rate_limit_in_legacy_mode() -> None:
    async with limited(rate_limit=1, legacy=True) as gateway:
        began = time.monotonic()
        await gateway.create()
        refused = await gateway.create()
        found = refused.json()
        wait = int(refused.headers["retry-after"])
        assert refused.status_code == 200
        assert is_left(wait, 60, began)
        assert found.pop("tips")
        assert found == {
            "status": "error",
            "message": "Rate limit exceeded",
            "messege": "Rate limit exceeded",
            "retry_after": wait,
        }


async def test_rejected_requests_do_not_count_and_fetch_is_not_limited() -> None:
    async with limited(rate_limit=1) as gateway:
        for wrong in ({"width": 5}, {"key": "x"}):
            assert (await gateway.create(**wrong)).status_code in (400, 401)
        made = (await gateway.create()).json()
        for _ in range(5):
            assert (await gateway.fetch(made["id"])).status_code == 200
        assert (await gateway.create()).status_code == 429


NOWHERE = "https://files.example.org/none.png"
NOT_AN_IMAGE = base64.b64encode(b"not an image").decode()


async def test_an_init_image_that_cannot_be_downloaded_or_read_costs_no_job() -> None:
    async with limited(rate_limit=1) as gateway:
        for wrong in (NOWHERE, NOT_AN_IMAGE):
            assert (await gateway.create(init_image=wrong)).status_code == 400
        assert (await gateway.create()).json()["status"] == "success"
        # The limit of this minute is reached, so no init image is downloaded.
        assert (await gateway.create(init_image=NOWHERE)).status_code == 429


async def test_a_flood_of_bad_init_images_is_rejected_before_their_download() -> None:
    async with limited(rate_limit=1) as gateway:
        began = time.monotonic()
        codes = [(await gateway.create(init_image=NOWHERE)).status_code for _ in range(MISTAKES)]
        assert codes == [400] * MISTAKES
        for next_one in (
            NOWHERE,
            PHOTO_URL,
        ):  # The gateway cannot distinguish the two cases before the download.
            refused = await gateway.create(init_image=next_one)
            assert refused.status_code == 429
            assert is_left(int(refused.headers["retry-after"]), 60 / MISTAKES, began)
            limit = f"Maximum {MISTAKES} requests per minute allowed."
            assert refused.json()["message"] == f"Rate limit exceeded. {limit}"


async def test_a_deadline_that_is_too_short_costs_no_job() -> None:
    async with limited(rate_limit=1) as gateway:
        stack = gateway.stack
        [worker] = await stack.bus.workers.workers()
        await stack.bus.workers.announce(replace(worker, job_seconds=900.0))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.generate(spec()).read()
        assert refusal(caught.value).reason == "DEADLINE_TOO_SHORT"
        assert (await gateway.create()).json()["status"] == "success"
        assert (await gateway.create()).status_code == 429


async def test_a_repeated_request_id_does_not_count() -> None:
    same = "5e0c8a0e-6d0e-4b7a-9c41-5e2d7f90ab16"
    async with limited(rate_limit=1) as gateway:
        first = await gateway.stack.api.create(spec(), request_id=same)
        again = await gateway.stack.api.create(spec(), request_id=same)
        assert again.id == first.id


async def test_each_key_has_its_own_rate_limit(tmp_path: Path) -> None:
    slow, slow_entry = new_key("shop", [], 1)
    free, free_entry = new_key("shop", [], 0)
    other, other_entry = new_key("shop", [])
    file = tmp_path / "keys.toml"
    file.write_text("\n".join((slow_entry, free_entry, other_entry)))
    async with limited(keys=KeyRing(file, dev_key=False), rate_limit=2) as gateway:
        codes = {
            name: [(await gateway.create(key=key)).status_code for _ in range(3)]
            for name, key in (("slow", slow), ("free", free), ("other", other))
        }
    assert codes == {"slow": [200, 429, 429], "free": [200] * 3, "other": [200, 200, 429]}


async def test_each_tenant_has_its_own_limit_of_open_calls(tmp_path: Path) -> None:
    (a, entry_a), (b, entry_b) = new_key("a", []), new_key("b", [])
    file = tmp_path / "keys.toml"
    file.write_text(f"{entry_a}\n{entry_b}")
    keys = KeyRing(file, dev_key=False)
    async with limited(keys=keys, hold=True, max_tenant_calls=1) as gateway:
        stub = gateway.stack.api.stub
        request = service_pb2.GenerateRequest(spec=spec())
        streams = [
            aiter(stub.Generate(request, metadata=[("authorization", f"Bearer {key}")]))
            for key in (a, b)
        ]
        jobs = [(await anext(stream)).event.snapshot.job for stream in streams]
        mine = [("authorization", f"Bearer {a}")]
        for refused in (
            stub.Generate(request, metadata=mine),
            stub.WatchJob(service_pb2.WatchJobRequest(name=jobs[0].name), metadata=mine),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await refused.read()
            found = refusal(caught.value)
            assert found.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (found.reason, found.retry_seconds) == ("TOO_MANY_CALLS", 1.0)
        over_http = await gateway.create(key=a)
        assert (over_http.status_code, over_http.headers["retry-after"]) == (429, "1")
        assert over_http.json()["message"] == "Rate limit exceeded. Maximum 1 open calls allowed."
        events = await gateway.http.get(
            f"/v1/jobs/{jobs[0].id}/events", headers={"Authorization": f"Bearer {a}"}
        )
        assert events.status_code == 429
        # Short calls are not counted, so fetch is never limited.
        assert (await gateway.fetch(jobs[0].id, key=a)).json()["status"] == "processing"
        gateway.stack.worker.engine.release()
        ended = [kinds([message async for message in stream])[-1] for stream in streams]
        assert ended == ["succeeded", "succeeded"]
        assert (await gateway.create(key=a)).json()["status"] == "success"


@pytest.mark.parametrize("method", ["CreateJob", "Generate"])
async def test_a_request_that_is_still_being_received_counts_as_open(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, count = asyncio.Event(), OpenCalls.count

    def counting(*given: Any) -> Any:
        begun.set()
        return count(*given)

    async def upload() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    async with limited(max_tenant_calls=1) as gateway:
        api = gateway.stack.api
        monkeypatch.setattr(OpenCalls, "count", counting)
        call = api.channel.stream_unary(f"/img2img.v1.Img2ImgService/{method}")(
            upload(), metadata=DEV
        )
        await begun.wait()
        assert await answer_of(api) == "TOO_MANY_CALLS"
        call.cancel()
        await until(lambda: answer_of(api), "created")


async def answer_of(api: Api) -> str:
    try:
        await api.create(spec())
    except grpc.aio.AioRpcError as error:
        return refusal(error).reason
    return "created"


async def test_a_cancelled_call_no_longer_counts_as_open() -> None:
    async with limited(hold=True, max_tenant_calls=1) as gateway:
        api = gateway.stack.api
        stream = api.generate(spec(), detach=True)
        await stream.read()
        stream.cancel()
        await until(lambda: answer_of(api), "created")


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
async def test_a_full_gateway_returns_503_and_its_probes_respond(legacy: bool) -> None:
    async with limited(hold=True, legacy=legacy, max_http_requests=1) as gateway:
        waiting = asyncio.create_task(gateway.http.post(f"{ENTERPRISE}/img2img", json=body()))
        bus = gateway.stack.bus
        await until(lambda: bus.jobs.list_ids("dev"), [FIRST_JOB_ID])
        full = await gateway.fetch(1)
        assert (full.status_code, full.headers["retry-after"]) == (200 if legacy else 503, "1")
        assert full.json()["message"].startswith("Service temporarily unavailable")
        assert full.headers["access-control-allow-origin"] == "*"
        assert (await gateway.http.get("/healthz")).status_code == 200
        gateway.stack.worker.engine.release()
        assert (await waiting).json()["status"] == "success"
        assert (await gateway.fetch(1)).status_code == (200 if legacy else 404)


def filled(megabytes: int, **fields: Any) -> bytes:
    """Returns a body of that size, most of it in an unknown field."""
    return json.dumps(body(**fields, filling="x" * megabytes * 2**20)).encode()


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
async def test_bodies_without_a_valid_key_are_bounded_for_each_address(
    legacy: bool,
) -> None:
    read, go_on = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield filled(30, key="wrong")
        read.set()
        await go_on.wait()

    async with limited(legacy=legacy) as gateway:
        path = f"{ENTERPRISE}/img2img"
        slow = asyncio.create_task(gateway.http.post(path, content=slowly()))
        await read.wait()
        refused = await gateway.http.post(path, content=filled(5, key="wrong"))
        assert (refused.status_code, refused.headers["retry-after"]) == (
            200 if legacy else 503,
            "1",
        )
        assert refused.json()["message"].startswith("Service temporarily unavailable")
        # A body that shows a valid key at its beginning counts to the tenant.
        assert (await gateway.http.post(path, content=filled(3))).json()["status"] == "success"
        go_on.set()
        assert (await slow).json()["message"].lower() == "invalid api key"
        assert (await gateway.http.post(path, content=filled(3))).json()["status"] == "success"


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b'{"a":[]}'], ids=repr)
async def test_a_body_of_too_many_values_is_refused_before_they_take_their_memory(
    value: bytes, legacy: bool
) -> None:
    sent = b'{"key":"wrong","a":[' + b",".join([value] * (2**22 // len(value))) + b"]}"
    async with limited(legacy=legacy) as gateway, measuring() as grown:
        answer = await gateway.http.post(f"{ENTERPRISE}/img2img", content=sent)
        assert max(grown(), 0) < len(sent)
        _, most = tracemalloc.get_traced_memory()
    assert most < 4 * len(sent)
    assert answer.status_code == (200 if legacy else 400)
    assert answer.json()["message"] == "Invalid JSON body"


async def test_a_body_may_have_as_many_values_as_the_longest_texts_have_commas() -> None:
    commas = {"prompt": "," * 2000, "negative_prompt": "," * 2000}
    async with limited() as gateway:
        path, filling = f"{ENTERPRISE}/img2img", [0] * (MAX_VALUES - 5000)
        answer = await gateway.http.post(path, json=body(**commas, filling=filling))
        assert answer.json()["status"] == "success"


@asynccontextmanager
async def measuring() -> AsyncIterator[Callable[[], int]]:
    """Yields a function that returns the number of bytes that were allocated since and not
    freed.
    """
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


HELD: list[tuple[str, dict[str, Any]]] = [
    (f"{ENTERPRISE}/img2img", {}),
    (f"{ENTERPRISE}/img2img", {"width": 5}),
    (f"{ENTERPRISE}/img2img", {"init_image": "🎨" * 2**20}),
    (f"{ENTERPRISE}/fetch/10000001", {}),
    (f"{ENTERPRISE}/fetch/x", {}),
    ("/api/v1/enterprise/fetch", {}),
    ("/api/v1/enterprise/fetch", {"request_id": "🎨" * 2**20}),
    (f"{ENTERPRISE}/clear_queue", {}),
    ("/api/v1/enterprise/update_s3", {"public_url": "🎨" * 2**20}),
    ("/api/v1/enterprise/reset_s3", {"deploy_type": "🎨" * 2**20}),
    ("/v1/jobs", {"spec": {"prompt": []}}),
    ("/v1/jobs", {"spec": {"annotations": {"a": [[]] * 5_000}}}),
]


@pytest.mark.parametrize(("path", "fields"), HELD, ids=lambda given: str(given)[:60])
async def test_the_parsed_body_is_freed_before_the_call_of_the_api(
    path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # ASCII text; one character beyond ASCII makes Python store four bytes for each character.
    parsed = {"key": "wrong", "filling": "x" * 2**20 + "🎨", "values": [{}] * 5_000}
    sent = json.dumps(body(**parsed, **fields)).encode()
    held: list[int] = []
    async with limited() as gateway, measuring() as grown:
        metadata = upstream._metadata

        def noting(key: str) -> Any:
            held.append(grown())
            return metadata(key)

        monkeypatch.setattr(upstream, "_metadata", noting)
        await gateway.http.post(path, content=sent)
    # The first call asks for the tenant of the key while the body arrives.
    assert len(held) >= 2
    assert max(held[1:]) < 2**20


async def test_a_body_is_not_held_while_its_job_runs() -> None:
    async with limited(hold=True, max_http_body_bytes=32 * 2**20) as gateway:
        path = f"{ENTERPRISE}/img2img"
        waiting = asyncio.create_task(gateway.http.post(path, content=filled(20)))

        async def answer() -> int:
            return (await gateway.http.post(path, content=filled(20, key="wrong"))).status_code

        bus = gateway.stack.bus
        await until(lambda: bus.jobs.list_ids("dev"), [FIRST_JOB_ID])
        await until(answer, 401)
        assert not waiting.done()
        gateway.stack.worker.engine.release()
        assert (await waiting).json()["status"] == "success"


@pytest.mark.parametrize("refused", [1, 10**6], ids=["for a while", "for ever"])
async def test_a_post_waits_on_when_its_job_cannot_be_watched(
    refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, watch = asyncio.Semaphore(0), upstream.Upstream.watch

    async def watching(*given: Any) -> AsyncIterator[Any]:
        nonlocal refused
        refused -= 1
        tried.release()
        if refused >= 0:
            raise RequestError(ErrorKind.UNAVAILABLE)
        async for event in watch(*given):
            yield event

    monkeypatch.setattr(upstream.Upstream, "watch", watching)
    monkeypatch.setattr(upstream, "WATCH_AGAIN_SECONDS", 0.01)
    async with limited(hold=True) as gateway:
        waiting = asyncio.create_task(gateway.create())
        # The first attempts have passed, so this one is rejected.
        twice = asyncio.gather(tried.acquire(), tried.acquire())
        await asyncio.wait({waiting, twice}, return_when=asyncio.FIRST_COMPLETED)
        assert not waiting.done()
        gateway.stack.worker.engine.release()
        assert (await waiting).json()["status"] == "success"


async def test_a_post_that_cannot_watch_or_get_its_job_returns_processing_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusing(*given: Any) -> Any:
        raise RequestError(ErrorKind.UNAVAILABLE)

    monkeypatch.setattr(upstream.Upstream, "watch", refusing)
    monkeypatch.setattr(upstream.Upstream, "get", refusing)
    monkeypatch.setattr(upstream, "WATCH_AGAIN_SECONDS", 0.01)
    async with limited(hold=True, wait_seconds=1) as gateway:
        answer = await gateway.create()
        assert (answer.status_code, answer.json()["status"]) == (200, "processing")


async def test_retry_after_says_when_a_place_is_expected() -> None:
    async with limited(hold=True, queue_limit=2) as gateway:
        # A worker that takes 40 s at 512x512 takes 10 s for a quarter of the pixels.
        seconds = WorkerInfo(name="w2", model=FAKE_MODEL, device="cpu", job_seconds=40.0)
        await gateway.stack.bus.workers.announce(seconds)
        for _ in range(2):
            await gateway.create(instant_response=True)
        refused = await gateway.create()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        assert refused.json()["retry_after"] == 10


async def test_a_hint_beyond_the_models_own_limit_is_ignored() -> None:
    engine = FakeEngine(replace(FAKE_MODEL, max_num_inference_steps=6, default_strength=0.4))
    async with running_gateway({"engine": engine}) as gateway:
        answer = await gateway.create(num_inference_steps=50)
        found = answer.json()
        assert (answer.status_code, found["status"]) == (200, "success")
        job = await gateway.stack.api.get(f"jobs/{found['id']}")
        assert job.spec.num_inference_steps == FAKE_MODEL.default_num_inference_steps
        # The value is the model's own default, as over gRPC.
        assert found["meta"]["strength"] == 0.4
        assert found["warning"] == ("num_inference_steps was ignored: it must be between 1 and 6.")
        wrong = await gateway.create(num_inference_steps=50, width=5)
        assert list(wrong.json()["errors"]) == ["width"]
