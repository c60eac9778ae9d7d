"""A job's events over HTTP, for EventSource and other readers of event streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from img2img_server.errors import JobNotFoundError
from img2img_server.testing.fake_engine import FakeEngine
from tests.http_stack import Gateway, error_body, gateway_before, running_gateway
from tests.stack import read_until, settings

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}
KINDS = [
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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    async with running_gateway() as running:
        yield running


async def finished(gateway: Gateway) -> int:
    """Returns a job that has ended, with twelve events."""
    answer = await gateway.create(strength=0.5)
    job_id: int = answer.json()["id"]
    return job_id


def parse(text: str) -> list[dict[str, Any]]:
    """Returns the events of a stream: {"event": "step", "id": "6", "data": {…}}."""
    found = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ")[::2] for line in block.split("\n") if line]
        if lines and lines[0][0]:
            entry: dict[str, Any] = dict(lines)
            found.append(entry | {"data": json.loads(entry["data"])})
    return found


async def test_every_event_comes_once_in_order_until_the_end(gateway: Gateway) -> None:
    job_id = await finished(gateway)
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/events", headers=KEY)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    events = parse(answer.text)
    assert [event["event"] for event in events] == KINDS
    assert [event["id"] for event in events] == [str(number) for number in range(12)]
    assert [event["data"]["sequence"] for event in events] == [str(n) for n in range(12)]
    step = events[6]["data"]
    assert (step["job"], step["step"]) == (
        f"jobs/{job_id}",
        {"sample": 0, "step": 2, "total": 2, "sigma": 0.0},
    )
    job = events[-1]["data"]["succeeded"]["job"]
    assert (job["state"], job["samples"][0]["nsfw"]) == ("STATE_SUCCEEDED", False)


@pytest.mark.parametrize(
    ("query", "headers"), [("?after_sequence=6", {}), ("", {"Last-Event-ID": "6"})]
)
async def test_a_reader_resumes_where_it_left_off(
    query: str, headers: dict[str, str], gateway: Gateway
) -> None:
    job_id = await finished(gateway)
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/events{query}", headers=KEY | headers)
    events = parse(answer.text)
    assert [event["event"] for event in events] == ["snapshot", *KINDS[7:]]
    assert [event["id"] for event in events] == ["6", "7", "8", "9", "10", "11"]


async def test_an_event_source_that_has_seen_the_end_is_reported_to_stop(gateway: Gateway) -> None:
    path = f"/v1/jobs/{await finished(gateway)}/events"
    seen = await gateway.http.get(path, headers=KEY | {"Last-Event-ID": "11"})
    assert (seen.status_code, seen.content) == (204, b"")
    missed = await gateway.http.get(path, headers=KEY | {"Last-Event-ID": "10"})
    assert [event["id"] for event in parse(missed.text)] == ["10", "11"]


@pytest.mark.parametrize("place", ["Authorization", "key", "X-API-Key"])
async def test_the_key_comes_in_a_header(place: str, gateway: Gateway) -> None:
    path = f"/v1/jobs/{await finished(gateway)}/events"
    for key, code in (("dev-key", 200), ("wrong", 401)):
        value = f"Bearer {key}" if place == "Authorization" else key
        answer = await gateway.http.get(path, headers={place: value})
        assert answer.status_code == code
    assert (await gateway.http.get(f"{path}?key=dev-key")).status_code == 401


@pytest.mark.parametrize("job_id", ["10000999", "abc", "-1", "99999999999999"])
async def test_an_unknown_job_is_404_before_the_stream_begins(
    job_id: str, gateway: Gateway
) -> None:
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/events", headers=KEY)
    expected = error_body("JOB_NOT_FOUND", str(JobNotFoundError(f"jobs/{job_id}")))
    assert (answer.status_code, answer.json()) == (404, expected)
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/events", headers={"key": "wrong"})
    assert answer.status_code == 401


@pytest.mark.parametrize("number", ["-1", "abc", "1.5", "9" * 30, "9223372036854775808"])
async def test_a_sequence_that_is_none_is_reported(number: str, gateway: Gateway) -> None:
    path = f"/v1/jobs/{await finished(gateway)}/events"
    for query, headers in ((f"?after_sequence={number}", {}), ("", {"Last-Event-ID": number})):
        answer = await gateway.http.get(path + query, headers=KEY | headers)
        assert answer.status_code == 400
        assert list(answer.json()["errors"]) == ["after_sequence"]


async def test_an_api_that_is_away_is_503_before_the_stream_begins(gateway: Gateway) -> None:
    async with gateway_before(gateway.stack, address="127.0.0.1:1") as away:
        answer = await away.http.get("/v1/jobs/10000001/events", headers=KEY)
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1


async def test_heartbeats_of_the_api_are_no_events_here() -> None:
    engine = FakeEngine(hold_after=1)
    stack = {"engine": engine, "api_config": settings(heartbeat_seconds=0.02)}
    async with running_gateway(stack, wait_seconds=0) as gateway:
        job_id = (await gateway.create(strength=0.5)).json()["id"]
        path = f"/v1/jobs/{job_id}/events"
        reading = asyncio.create_task(gateway.http.get(path, headers=KEY))
        background_task = gateway.stack.api.watch(f"jobs/{job_id}")
        await read_until(background_task, "step")
        for _ in range(3):
            await read_until(background_task, "heartbeat")
        engine.release()
        text = (await reading).text
    assert [event["event"] for event in parse(text)] == KINDS
    assert ": ping" not in text
