"""Idempotency-Key, the request_id of a POST, and the search for its job."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from typing import Any

import httpx
import pytest

from img2img_server.errors import UnavailableError
from img2img_server.idempotency import request_id_of
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.http_stack import ENTERPRISE, V6, Gateway, body, gateway_before, running_gateway
from tests.stack import running_stack, spec

KEY = {"Authorization": "Bearer dev-key"}
IMG2IMG = f"{ENTERPRISE}/img2img"


async def post(
    gateway: Gateway, key: str | None = None, path: str = IMG2IMG, **changes: Any
) -> httpx.Response:
    """Posts a valid request with that Idempotency-Key."""
    headers = {} if key is None else {"Idempotency-Key": key}
    return await gateway.http.post(path, json=body(**changes), headers=headers)


async def listed(gateway: Gateway, request_id: str = "") -> list[str]:
    """Returns the ids of the jobs that the gateway lists."""
    answer = await gateway.http.get("/v1/jobs", params={"request_id": request_id}, headers=KEY)
    assert answer.status_code == 200, answer.text
    return [job["id"] for job in answer.json()["jobs"]]


@pytest.mark.parametrize(
    "key", ["0e6c2c1e-7d5b-4f0a-8a4d-0b9f1c2d3e4f", "order 17/a", '"quoted"', "x" * 255]
)
async def test_posts_with_the_same_key_get_the_same_job(key: str) -> None:
    async with running_gateway() as gateway:
        first, again = await post(gateway, key), await post(gateway, key)
        assert (first.status_code, first.json()["status"]) == (200, "success")
        assert again.json()["id"] == first.json()["id"]
        assert again.json()["output"] == first.json()["output"]
        other = await post(gateway, key + "y" if len(key) < 255 else "y", prompt="a forest")
        assert other.json()["id"] != first.json()["id"]
        sent = request_id_of(key)
        assert [each.headers["x-request-id"] for each in (first, again)] == [sent, sent]
        assert await listed(gateway, key) == [str(first.json()["id"])]
        assert await listed(gateway, sent) == [str(first.json()["id"])]
        assert len(await listed(gateway)) == 2


async def test_overlapping_posts_at_two_gateways_get_the_same_job() -> None:
    async with (
        running_gateway({"engine": FakeEngine(hold_after=1)}) as one,
        gateway_before(one.stack) as two,
    ):
        posting = [asyncio.create_task(post(each, "same")) for each in (one, two, one)]
        async with asyncio.timeout(30):
            while not await listed(one, "same"):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        one.stack.worker.engine.release()
        answers = await asyncio.gather(*posting)
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 1


async def test_a_post_without_a_key_draws_an_id_by_which_its_job_is_found() -> None:
    async with running_gateway() as gateway:
        answers = [await post(gateway), await post(gateway, path=f"{V6}/img2img")]
        for answer in answers:
            drawn = answer.headers["x-request-id"]
            assert await listed(gateway, drawn) == [str(answer.json()["id"])]
            again = await post(gateway, drawn)
            assert again.json()["id"] == answer.json()["id"]
        assert len({answer.json()["id"] for answer in answers}) == 2
        assert await listed(gateway, str(uuid.uuid4())) == []


async def test_a_caller_whose_gateway_was_lost_finds_the_job_by_its_key() -> None:
    async with running_stack(FakeEngine(hold_after=1), fetch=_photo) as stack:
        async with gateway_before(stack) as lost:
            posting = asyncio.create_task(post(lost, "before the crash"))
            async with asyncio.timeout(30):
                while not (found := await listed(lost, "before the crash")):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            posting.cancel()
        async with gateway_before(stack) as other:
            assert await listed(other, "before the crash") == found
            stack.worker.engine.release()
            again = await post(other, "before the crash")
            assert (again.json()["status"], str(again.json()["id"])) == ("success", found[0])


async def _photo(_: str) -> bytes:
    return spec().init_image.data


async def test_a_key_of_another_request_is_refused() -> None:
    async with running_gateway() as gateway:
        await post(gateway, "mine")
        other = await post(gateway, "mine", prompt="a forest")
        message = "Idempotency-Key was used for a different request"
        assert (other.status_code, other.json()["message"]) == (409, message)


async def test_a_key_holds_although_a_hint_of_the_request_was_dropped() -> None:
    engine = FakeEngine(replace(FAKE_MODEL, max_num_inference_steps=6))
    async with running_gateway({"engine": engine}) as gateway:
        answers = [await post(gateway, "hint", num_inference_steps=50) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].json()["id"] == answers[1].json()["id"]
        without = await post(gateway, "hint")
        assert without.status_code == 409


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "é"])
@pytest.mark.parametrize("path", [IMG2IMG, "/v1/jobs"])
async def test_a_key_that_is_no_key_is_refused(key: str, path: str) -> None:
    async with running_gateway() as gateway:
        sent = body() if path == IMG2IMG else {"spec": {"prompt": "p"}}
        headers = {**KEY, "Idempotency-Key": key.encode()}
        answer = await gateway.http.post(path, json=sent, headers=headers)
        assert answer.status_code == 400
        assert "Idempotency-Key must have 1 to 255" in answer.text
        assert await listed(gateway) == []


async def test_the_id_in_the_body_of_v1_comes_before_the_header() -> None:
    async with running_gateway() as gateway:
        chosen = str(uuid.uuid4())
        sent = {
            "spec": {"prompt": "p", "init_image": {"url": body()["init_image"]}},
            "request_id": chosen,
        }
        headers = {**KEY, "Idempotency-Key": "another"}
        answer = await gateway.http.post("/v1/jobs", json=sent, headers=headers)
        assert answer.headers["x-request-id"] == chosen
        assert await listed(gateway, chosen) == [answer.json()["job"]["id"]]
        assert await listed(gateway, "another") == []


async def test_the_gateway_repeats_a_call_that_found_the_service_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_gateway() as gateway:
        queue, calls = gateway.stack.bus.queue, 0
        put = queue.put

        async def fails_twice(*args: Any) -> int:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise UnavailableError
            place = await put(*args)
            if calls == 2:  # The job is queued, and the api does not learn it.
                raise UnavailableError
            return place

        monkeypatch.setattr(queue, "put", fails_twice)
        answer = await post(gateway)
        assert (answer.status_code, answer.json()["status"]) == (200, "success")
        assert calls >= 2
        assert await listed(gateway) == [str(answer.json()["id"])]


async def test_a_page_may_send_the_header() -> None:
    async with running_gateway() as gateway:
        asked = {"Access-Control-Request-Headers": "content-type,idempotency-key"}
        allowed = [
            (await gateway.http.options(IMG2IMG, headers=headers)).headers[
                "access-control-allow-headers"
            ]
            for headers in (asked, {})
        ]
        assert ["Idempotency-Key" in each for each in allowed] == [True, False]
