"""Tokens of one job: they open its event stream without an API key, and nothing else."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from img2img.v1 import service_pb2
from img2img_server import clock
from img2img_server.api.interceptors import TOKEN_STREAMS
from img2img_server.api.keys import KeyRing, Principal, new_key
from img2img_server.api.stream_tokens import METHOD, StreamTokens
from img2img_server.errors import StreamTokenExpiredError, StreamTokenKeysMissingError
from img2img_server.settings import SettingsError
from img2img_server.testing.fake_engine import FakeEngine
from tests.contract.test_http_contract_events import KINDS, parse
from tests.http_stack import Gateway, photo_base64, running_gateway
from tests.stack import refusal, settings, spec

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}
SECRET, OTHER = "a" * 32, "b" * 32
DEV_METADATA = [("authorization", "Bearer dev-key")]
DEV = Principal("dev", key_id=KeyRing(None, dev_key=True).principals()[0].key_id)
RING = KeyRing(None, dev_key=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    stack = {"api_config": settings(stream_token_keys=SECRET, stream_token_seconds=60)}
    async with running_gateway(stack) as running:
        yield running


async def finished(gateway: Gateway) -> str:
    """Returns the id of a job that has ended."""
    return str((await gateway.create(strength=0.5)).json()["id"])


async def token_of(gateway: Gateway, job_id: str) -> str:
    answer = await gateway.http.post(f"/v1/jobs/{job_id}:token", headers=KEY)
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["token"]
    return token


async def test_a_token_opens_the_event_stream_of_its_job(gateway: Gateway) -> None:
    job_id = await finished(gateway)
    answer = await gateway.http.post(f"/v1/jobs/{job_id}:token", headers=KEY)
    made = answer.json()
    assert re.fullmatch(r"[A-Za-z0-9_-]+", made["token"]), "a URL can have it unescaped"
    assert answer.headers["cache-control"] == "no-store"
    end = datetime.fromisoformat(made["expire_time"]).timestamp()
    assert 0 < end - time.time() <= 61
    path = f"/v1/jobs/{job_id}/events?token={made['token']}"
    events = parse((await gateway.http.get(path)).text)
    assert [event["event"] for event in events] == KINDS
    seen = await gateway.http.get(path, headers={"Last-Event-ID": "11"})
    assert seen.status_code == 204
    missed = await gateway.http.get(path, headers={"Last-Event-ID": "6"})
    assert [event["id"] for event in parse(missed.text)] == ["6", "7", "8", "9", "10", "11"]
    wrong = await gateway.http.get(f"{path}&after_sequence=x")
    assert (wrong.status_code, list(wrong.json()["errors"])) == (400, ["after_sequence"])


async def test_a_token_works_over_grpc_too(gateway: Gateway) -> None:
    job_id = await finished(gateway)
    request = service_pb2.CreateStreamTokenRequest(name=f"jobs/{job_id}")
    api = gateway.stack.api
    made = await api.stub.CreateStreamToken(request, metadata=[("authorization", "Bearer dev-key")])
    metadata = [("authorization", f"Bearer {made.token}")]
    watched = service_pb2.WatchJobRequest(name=f"jobs/{job_id}")
    kinds = [
        response.event.WhichOneof("event")
        async for response in api.stub.WatchJob(watched, metadata=metadata)
    ]
    assert kinds == KINDS


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/{id}"),
        ("GET", "/v1/jobs"),
        ("POST", "/v1/jobs/{id}:cancel"),
        ("POST", "/v1/jobs/{id}:token"),
        ("POST", "/v1/jobs"),
        ("GET", "/v1/capabilities"),
        ("GET", "/v1/models"),
        ("POST", "/api/v6/realtime/fetch/{id}"),
    ],
)
async def test_a_token_is_accepted_nowhere_else(method: str, path: str, gateway: Gateway) -> None:
    job_id = await finished(gateway)
    token = await token_of(gateway, job_id)
    path = path.replace("{id}", job_id)
    image = {"spec": {"prompt": "a", "init_image": {"data": photo_base64()}}}
    sent: dict[str, Any] = {"json": image} if method == "POST" else {}
    for headers, query in (({"Authorization": f"Bearer {token}"}, ""), ({}, f"?token={token}")):
        answer = await gateway.http.request(method, path + query, headers=headers, **sent)
        assert answer.status_code == 401, answer.text


async def test_an_api_key_in_the_query_is_refused(gateway: Gateway) -> None:
    job_id = await finished(gateway)
    for text in ("dev-key", "x", "I2T_x"):
        answer = await gateway.http.get(f"/v1/jobs/{job_id}/events?token={text}")
        assert answer.status_code == 401


async def test_streams_of_a_token_do_not_use_up_the_calls_of_keys() -> None:
    stack = {
        "api_config": settings(stream_token_keys=SECRET, max_tenant_calls=2),
        "engine": FakeEngine(hold_after=1),
    }
    async with running_gateway(stack) as gateway, AsyncExitStack() as streams:
        api = gateway.stack.api
        wanted = service_pb2.CreateJobRequest(spec=spec())
        job = (await api.stub.CreateJob(wanted, metadata=DEV_METADATA)).job
        token = await token_of(gateway, str(job.id))
        watch = service_pb2.WatchJobRequest(name=job.name)
        calls = []
        for number in range(TOKEN_STREAMS + 1):
            call = api.stub.WatchJob(watch, metadata=[("authorization", f"Bearer {token}")])
            streams.callback(call.cancel)
            calls.append(call)
            if number < TOKEN_STREAMS:
                assert await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await calls[-1].read()
        assert refusal(caught.value).reason == "TOO_MANY_CALLS"
        own = api.stub.WatchJob(watch, metadata=DEV_METADATA)
        streams.callback(own.cancel)
        assert await own.read()
        assert (await api.stub.CreateJob(wanted, metadata=DEV_METADATA)).job.id


async def test_a_token_of_another_job_finds_no_job(gateway: Gateway) -> None:
    first, second = await finished(gateway), await finished(gateway)
    token = await token_of(gateway, first)
    answer = await gateway.http.get(f"/v1/jobs/{second}/events?token={token}")
    assert (answer.status_code, answer.json()["reason"]) == (404, "JOB_NOT_FOUND")


async def test_a_token_is_made_for_a_job_of_the_tenant_only(gateway: Gateway) -> None:
    unknown = await gateway.http.post("/v1/jobs/10000999:token", headers=KEY)
    assert (unknown.status_code, unknown.json()["reason"]) == (404, "JOB_NOT_FOUND")
    wrong = await gateway.http.post(
        f"/v1/jobs/{await finished(gateway)}:token", headers={"key": "wrong"}
    )
    assert wrong.status_code == 401


async def test_an_expired_token_is_refused_with_a_reason(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await finished(gateway)
    token = await token_of(gateway, job_id)
    now = clock.now
    monkeypatch.setattr(clock, "now", lambda: now() + 61)
    answer = await gateway.http.get(f"/v1/jobs/{job_id}/events?token={token}")
    expected = (401, "STREAM_TOKEN_EXPIRED", str(StreamTokenExpiredError()))
    body = answer.json()
    assert (answer.status_code, body["reason"], body["message"]) == expected


async def test_no_log_line_has_a_token(gateway: Gateway, capfd: pytest.CaptureFixture[str]) -> None:
    job_id = await finished(gateway)
    token = await token_of(gateway, job_id)
    await gateway.http.get(f"/v1/jobs/{job_id}/events?token={token}")
    await gateway.http.get(f"/v1/jobs/10000999/events?token={token}")
    written = "".join(capfd.readouterr())
    assert "/v1/jobs/{job_id}/events" in written
    assert token not in written
    assert token[4:40] not in written


async def test_without_keys_no_token_is_made() -> None:
    async with running_gateway() as gateway:
        job_id = await finished(gateway)
        answer = await gateway.http.post(f"/v1/jobs/{job_id}:token", headers=KEY)
    assert (answer.status_code, answer.json()["reason"]) == (503, "STREAM_TOKEN_KEYS_MISSING")
    assert "IMG2IMG_STREAM_TOKEN_KEYS" in answer.json()["message"]


async def test_every_api_with_the_same_keys_takes_a_token() -> None:
    token, _ = StreamTokens(SECRET, 60, RING).make(DEV, 10_000_001)
    for keys in (SECRET, f"{OTHER},{SECRET}", f" {SECRET} , {OTHER}"):
        found = StreamTokens(keys, 60, RING).authenticate(token, METHOD)
        assert found is not None
        assert (found.tenant, found.only_job, found.permissions) == ("dev", 10_000_001, frozenset())
    for keys in (OTHER, ""):
        assert StreamTokens(keys, 60, RING).authenticate(token, METHOD) is None


def changed(token: str) -> Iterator[str]:
    """Yields the token with each byte changed, cut off at each byte, and with parts of another."""
    signed = base64.urlsafe_b64decode(token[4:] + "=" * (-len(token[4:]) % 4))
    for place in range(len(signed)):
        forged = bytearray(signed)
        forged[place] ^= 1
        yield "i2t_" + base64.urlsafe_b64encode(forged).decode().rstrip("=")
        yield "i2t_" + base64.urlsafe_b64encode(signed[:place]).decode().rstrip("=")
    yield from ("i2t_", "i2t_ä", "", token[4:], "i2t_" + "!" * 80, "i2t_" + "A" * 200)


async def test_a_changed_token_is_refused() -> None:
    tokens = StreamTokens(SECRET, 60, RING)
    token, _ = tokens.make(DEV, 10_000_001)
    assert tokens.authenticate(token, METHOD)
    assert tokens.authenticate(token, "GetJob") is None
    assert [text for text in changed(token) if tokens.authenticate(text, METHOD)] == []


async def test_a_token_ends_with_the_key_that_made_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    _, entry = new_key("shop", ["unsafe"], key_id="web")
    _, other = new_key("shop", [], key_id="other")
    file.write_text(f"{entry}\n{other}")
    token, _ = StreamTokens(SECRET, 60, KeyRing(file, dev_key=False)).make(
        Principal("shop", key_id="web"), 10_000_001
    )

    def found() -> Principal | None:
        ring = KeyRing(file, dev_key=False)
        return StreamTokens(SECRET, 60, ring).authenticate(token, METHOD)

    assert found()
    file.write_text(other)
    assert found() is None


async def test_the_time_of_a_token_is_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = StreamTokens(SECRET, 60, RING)
    monkeypatch.setattr(clock, "now", lambda: 1000.0)
    token, end = tokens.make(DEV, 10_000_001)
    assert end == 1060.0
    monkeypatch.setattr(clock, "now", lambda: 1059.9)
    assert tokens.authenticate(token, METHOD)
    monkeypatch.setattr(clock, "now", lambda: 1060.0)
    with pytest.raises(StreamTokenExpiredError):
        tokens.authenticate(token, METHOD)


async def test_short_keys_are_refused_and_none_make_no_tokens() -> None:
    with pytest.raises(SettingsError, match="IMG2IMG_STREAM_TOKEN_KEYS: every key must have"):
        StreamTokens(f"{SECRET},short", 60, RING)
    with pytest.raises(StreamTokenKeysMissingError):
        StreamTokens("", 60, RING).make(DEV, 1)
