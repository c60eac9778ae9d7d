"""Responses of img2img and fetch about a job (docs/http-contract.md#responses)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from img2img.v1 import job_pb2
from img2img_server.testing.fake_engine import FakeEngine, FixedSafetyChecker
from tests.golden_file import assert_golden
from tests.http_stack import (
    BASE,
    ENTERPRISE,
    META_KEYS,
    V6,
    Gateway,
    body,
    error_body,
    fetch_photo,
    gateway_before,
    running_gateway,
)
from tests.stack import running_api, running_stack, settings

V6_IMAGES = "/api/v6/images"
SOON_SECONDS = 10  # a time well below wait_seconds
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@asynccontextmanager
async def held_gateway(**changes: Any) -> AsyncIterator[tuple[Gateway, FakeEngine]]:
    """Yields a gateway whose jobs stop after their first step until the engine is released."""
    engine = FakeEngine(hold_after=1)
    async with running_gateway({"engine": engine}, **changes) as gateway:
        yield gateway, engine


async def ended(gateway: Gateway, job_id: int) -> job_pb2.Job:
    """Returns the record of a job once it has ended."""
    async for _ in gateway.stack.api.watch(f"jobs/{job_id}"):
        pass
    return await gateway.stack.api.get(f"jobs/{job_id}")


def golden(answer: httpx.Response) -> str:
    """Returns status and body for a golden file, without the values that differ in each run."""
    text = json.dumps({"http": answer.status_code, "body": answer.json()}, indent=1)
    text = re.sub(UUID, "00000000-0000-4000-8000-000000000000", text)
    return re.sub(r'("generationTime"|"eta"): [0-9.]+', r"\1: 0.5", text) + "\n"


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
async def test_answers_are_the_golden_ones(legacy: bool) -> None:
    folder = "http/legacy" if legacy else "http/today"
    everything = {
        "negative_prompt": "blurry",
        "samples": 2,
        "strength": 0.55,
        "track_id": "order-77",
        "enhance_style": "anime",
    }
    async with held_gateway(legacy=legacy) as (gateway, engine):
        posted = await gateway.create(**everything, instant_response=True)
        job_id = posted.json()["id"]
        assert_golden(f"{folder}/processing.json", golden(posted))
        assert_golden(f"{folder}/fetch_processing.json", golden(await gateway.fetch(job_id)))
        engine.release()
        await ended(gateway, job_id)
        assert_golden(f"{folder}/fetch_success.json", golden(await gateway.fetch(job_id)))
        assert_golden(f"{folder}/success.json", golden(await gateway.create(**everything)))
        failed = await gateway.create(prompt="fail:out of memory")
        assert_golden(f"{folder}/failed.json", golden(failed))
        assert_golden(f"{folder}/fetch_failed.json", golden(await gateway.fetch(10000003)))
        assert_golden(f"{folder}/fetch_unknown.json", golden(await gateway.fetch(10000999)))
        assert_golden(f"{folder}/error_fields.json", golden(await gateway.create(width=5)))
        assert_golden(f"{folder}/error_key.json", golden(await gateway.create(key="wrong")))


async def test_a_post_waits_for_its_job_and_answers_with_links_that_work() -> None:
    async with running_gateway() as gateway:
        answer = await gateway.create(samples=3, seed=2**32 - 1)
        reported = answer.json()
        assert (answer.status_code, reported["status"], reported["proxy_links"]) == (
            200,
            "success",
            reported["output"],
        )
        assert sorted(reported["meta"]) == META_KEYS
        prefix = reported["meta"]["file_prefix"]
        assert reported["output"] == [f"{BASE}/generations/{prefix}-{i}.png" for i in range(3)]
        assert isinstance(reported["generationTime"], float)
        assert isinstance(reported["nsfw_content_detected"], bool)
        assert reported["meta"]["id"] == str(reported["id"])
        assert reported["meta"]["seed"] == 2**32 - 1
        images = [(await gateway.http.get(link)).content for link in reported["output"]]
        assert len(set(images)) == 3


@pytest.mark.parametrize("at_once", [{"instant_response": 1}, {"webhook": "https://a.example/h"}])
async def test_instant_response_and_webhook_answer_at_once(at_once: dict[str, Any]) -> None:
    async with held_gateway() as (gateway, _):
        reported = (await asyncio.wait_for(gateway.create(**at_once), SOON_SECONDS)).json()
        assert (reported["status"], reported["output"], reported["meta"]["webhook"]) == (
            "processing",
            [],
            at_once.get("webhook"),
        )


async def test_a_job_that_outlasts_wait_seconds_is_processing_and_its_links_come_true() -> None:
    async with held_gateway(wait_seconds=0.05) as (gateway, engine):
        reported = (await gateway.create()).json()
        assert (reported["status"], reported["meta"]["instant_response"]) == ("processing", "no")
        assert reported["eta"] >= 0
        early = await gateway.http.get(reported["future_links"][0])
        assert (early.status_code, early.headers["cache-control"]) == (404, "no-store")
        engine.release()
        await ended(gateway, reported["id"])
        done = (await gateway.fetch(reported["id"])).json()
        assert done["output"] == reported["future_links"]
        assert (await gateway.http.get(reported["future_links"][0])).status_code == 200


async def test_wait_seconds_zero_never_waits() -> None:
    async with held_gateway(wait_seconds=0) as (gateway, _):
        assert (await gateway.create()).json()["status"] == "processing"


async def test_a_stopping_gateway_lets_waiting_posts_go() -> None:
    async with held_gateway() as (gateway, _):
        gateway.stop.set()
        answer = await asyncio.wait_for(gateway.create(), SOON_SECONDS)
        assert answer.json()["status"] == "processing"


@pytest.mark.parametrize("family", [ENTERPRISE, V6])
async def test_fetch_result_stays_in_the_family_that_was_called(family: str) -> None:
    async with held_gateway() as (gateway, _):
        made = (await gateway.create(f"{family}/img2img", instant_response=True)).json()
        assert made["fetch_result"] == f"{BASE}{family}/fetch/{made['id']}"
        for called in (ENTERPRISE, V6, V6_IMAGES):
            # A job id works on every path, whichever path created the job.
            reported = (await gateway.fetch(made["id"], called)).json()
            assert reported["fetch_result"] == f"{BASE}{called}/fetch/{made['id']}"
        for called, stays in (("/api/v1/enterprise", ENTERPRISE), (V6_IMAGES, V6_IMAGES)):
            for request_id in (made["id"], str(made["id"])):
                sent = {"key": "dev-key", "request_id": request_id}
                reported = (await gateway.http.post(f"{called}/fetch", json=sent)).json()
                assert reported["fetch_result"] == f"{BASE}{stays}/fetch/{made['id']}"


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
@pytest.mark.parametrize("family", [ENTERPRISE, V6, V6_IMAGES])
async def test_fetch_answers_get_with_the_key_in_a_header(family: str, legacy: bool) -> None:
    async with running_gateway(legacy=legacy) as gateway:
        job_id = (await gateway.create()).json()["id"]
        path = f"{family}/fetch/{job_id}"
        assert (await gateway.http.get(path, headers={"key": "dev-key"})).json()["id"] == job_id
        refused = await gateway.http.get(f"{path}?key=dev-key")
        assert (refused.status_code, refused.json()["status"]) == (200 if legacy else 401, "error")


async def test_a_failed_job_is_http_200_on_post_and_fetch() -> None:
    async with running_gateway() as gateway:
        posted = await gateway.create(prompt="fail:out of memory")
        expected = {
            "status": "failed",
            "id": posted.json()["id"],
            "message": "Processing failed: out of memory",
            "output": [],
        }
        assert (posted.status_code, posted.json()) == (200, expected)
        fetched = await gateway.fetch(expected["id"])
        assert (fetched.status_code, fetched.json()) == (200, expected)


async def test_a_cancelled_job_is_failed_with_its_own_message() -> None:
    async with held_gateway() as (gateway, _):
        job_id = (await gateway.create(instant_response=True)).json()["id"]
        await gateway.stack.api.cancel(f"jobs/{job_id}")
        await ended(gateway, job_id)
        assert (await gateway.fetch(job_id)).json() == {
            "status": "failed",
            "id": job_id,
            "message": "Cancelled",
            "output": [],
        }


@pytest.mark.parametrize("job_id", ["10000999", "1", "abc", "-1", "1e3", "99999999999999", "%20"])
async def test_an_unknown_id_is_404_by_day_and_200_failed_in_legacy(job_id: str) -> None:
    async with running_gateway() as gateway, gateway_before(gateway.stack, legacy=True) as old:
        answer = await gateway.fetch(job_id)
        expected = error_body("JOB_NOT_FOUND", "Request not found")
        assert (answer.status_code, answer.json()) == (404, expected)
        answer = await old.fetch(job_id)
        assert (answer.status_code, answer.json()) == (
            200,
            {"status": "failed", "id": "", "message": "Request not found", "output": "", "tip": ""},
        )


@pytest.mark.parametrize("request_id", ["abc", 10000999, 1.5, True, [], {}])
async def test_an_unknown_request_id_is_404(request_id: Any) -> None:
    async with running_gateway() as gateway:
        sent = {"key": "dev-key", "request_id": request_id}
        answer = await gateway.http.post(f"{V6_IMAGES}/fetch", json=sent)
        assert (answer.status_code, answer.json()["message"]) == (404, "Request not found")


@pytest.mark.parametrize("nothing", [{}, {"request_id": None}, {"request_id": ""}])
async def test_a_missing_request_id_is_reported(nothing: dict[str, Any]) -> None:
    async with running_gateway() as gateway:
        answer = await gateway.http.post(f"{V6_IMAGES}/fetch", json={"key": "dev-key", **nothing})
        assert (answer.status_code, answer.json()) == (
            400,
            error_body(
                "INVALID_REQUEST",
                "request_id is required",
                errors={"request_id": ["request_id is required"]},
            ),
        )


async def test_links_point_to_where_the_job_was_accepted() -> None:
    async with held_gateway() as (gateway, _):
        sent = body(instant_response=True)
        first, second = {"host": "first.example:8080"}, {"host": "second.example"}
        made = (await gateway.http.post(f"{V6}/img2img", json=sent, headers=first)).json()
        assert made["fetch_result"] == f"http://first.example:8080{V6}/fetch/{made['id']}"
        path, key = f"{V6}/fetch/{made['id']}", {"key": "dev-key"}
        fetched = (await gateway.http.post(path, json=key, headers=second)).json()
        assert fetched["fetch_result"] == made["fetch_result"]
        assert fetched["future_links"] == made["future_links"]
        assert made["future_links"][0].startswith("http://first.example:8080/generations/")


async def test_public_base_url_is_the_base_of_all_links() -> None:
    async with held_gateway(public_base_url="https://cdn.example.org/pics/") as (gateway, _):
        made = (await gateway.create(instant_response=True)).json()
        base = "https://cdn.example.org/pics"
        assert made["fetch_result"] == f"{base}{ENTERPRISE}/fetch/{made['id']}"
        assert made["future_links"][0].startswith(f"{base}/generations/")


async def test_a_host_that_is_none_does_not_become_a_link() -> None:
    async with held_gateway() as (gateway, _):
        sent, host = body(instant_response=True), {"host": "evil.example/<script>"}
        answer = await gateway.http.post(f"{V6}/img2img", json=sent, headers=host)
        assert answer.json()["status"] == "processing"
        assert "evil" not in answer.text


async def test_temp_files_lie_under_temp() -> None:
    async with running_gateway() as gateway:
        link = (await gateway.create(temp=True)).json()["output"][0]
        assert re.fullmatch(f"{BASE}/temp/{UUID}-0.png", link)
        assert (await gateway.http.get(link)).status_code == 200


async def test_flagged_samples_set_the_flag_and_the_job_succeeds() -> None:
    async with running_gateway({"safety": FixedSafetyChecker(1.0)}) as gateway:
        reported = (await gateway.create()).json()
        assert (reported["status"], reported["nsfw_content_detected"]) == ("success", True)
        reported = (await gateway.create(safety_checker=False)).json()
        assert (reported["status"], reported["nsfw_content_detected"]) == ("success", False)


async def test_base64_gives_links_to_text_files() -> None:
    async with running_gateway() as gateway:
        reported = (await gateway.create(base64=True)).json()
        link = reported["output"][0]
        assert re.fullmatch(f"{BASE}/generations/{UUID}-0.base64", link)
        text = await gateway.http.get(link)
        assert text.headers["content-type"].startswith("text/plain")
        assert text.text.startswith("iVBORw0KGgo")


async def test_base64_inline_puts_the_strings_into_output_and_leaves_future_links() -> None:
    async with held_gateway(base64_inline=True) as (gateway, engine):
        made = (await gateway.create(base64=True, instant_response=True)).json()
        assert made["future_links"][0].endswith(".base64")
        engine.release()
        await ended(gateway, made["id"])
        reported = (await gateway.fetch(made["id"])).json()
        assert reported["output"][0].startswith("iVBORw0KGgo")
        assert reported["proxy_links"] == reported["output"]
        plain = (await gateway.create()).json()
        assert plain["output"][0].endswith(".png")


async def test_webhooks_without_tls_go_to_listed_hosts_only() -> None:
    listed = "127.0.0.1, hooks.internal, 10.2.0.0/16"
    async with running_stack(fetch=fetch_photo) as stack:
        config = settings(outbound_allow=listed)
        async with (
            running_api(stack.bus, config, fetch=fetch_photo) as api,
            gateway_before(replace(stack, api=api), outbound_allow=listed) as gateway,
        ):
            for host in ("127.0.0.1:9", "hooks.internal", "HOOKS.internal.", "10.2.3.4"):
                answer = await gateway.create(webhook=f"http://{host}/a")
                assert (answer.status_code, answer.json()["status"]) == (200, "processing")
            for host in ("10.3.0.1", "internal", "127.1", "me@127.0.0.1"):
                answer = await gateway.create(webhook=f"http://{host}/a")
                assert (answer.status_code, answer.json()["message"]) == (
                    400,
                    "webhook must be a valid URL",
                )
