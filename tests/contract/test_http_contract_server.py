"""The gateway as a server: real HTTP connections, real clients and a real stop."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import trustme
from structlog.testing import capture_logs

from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.http import event_stream
from img2img_server.gateway.readiness import Readiness
from img2img_server.gateway.server import serve
from img2img_server.settings import SettingsError
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.http_stack import ENTERPRISE, body, served_gateway
from tests.stack import Stack, running_api, settings

KEY = {"Authorization": "Bearer dev-key"}
SECONDS = 60.0


async def api_trouble(channel: grpc.aio.Channel) -> str:
    """Returns the reason why a gateway with this channel cannot use its api."""
    return await Readiness(channel, MemoryBlobStore(), asyncio.Event()).api_trouble()


async def lines_until(lines: AsyncIterator[str], wanted: str) -> list[str]:
    """Reads a stream up to a line, and returns the lines."""
    found: list[str] = []
    async for line in lines:
        found.append(line)
        if line == wanted:
            return found
    raise AssertionError(f"no {wanted!r} in {found}")


async def accepted(stack: Stack, job_id: int) -> None:
    """Returns once the job has its first event."""
    async with stack.bus.events.watch(job_id) as log:
        await anext(log)


async def test_links_point_to_the_port_that_was_called() -> None:
    async with served_gateway() as gateway:
        gateway.engine.release()
        made = (await gateway.http.post(f"{ENTERPRISE}/img2img", json=body())).json()
        assert made["output"][0].startswith(f"http://{gateway.address}/generations/")
        image = await gateway.http.get(made["output"][0])
        assert image.content.startswith(b"\x89PNG")
        assert (await gateway.http.get("/readyz")).json() == {"status": "ready"}


async def test_events_arrive_while_the_job_runs() -> None:
    async with served_gateway() as gateway:
        sent = body(instant_response=True)
        job_id = (await gateway.http.post(f"{ENTERPRISE}/img2img", json=sent)).json()["id"]
        async with gateway.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=KEY) as stream:
            lines = aiter(stream.aiter_lines())
            await asyncio.wait_for(lines_until(lines, "event: step"), SECONDS)
            gateway.engine.release()
            await asyncio.wait_for(lines_until(lines, "event: succeeded"), SECONDS)


async def test_a_quiet_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "PING_SECONDS", 0.02)
    async with served_gateway() as gateway:
        sent = body(instant_response=True)
        job_id = (await gateway.http.post(f"{ENTERPRISE}/img2img", json=sent)).json()["id"]
        async with gateway.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=KEY) as stream:
            await asyncio.wait_for(lines_until(aiter(stream.aiter_lines()), ": ping"), SECONDS)


async def test_a_client_that_hangs_up_does_not_cancel_its_job() -> None:
    async with served_gateway() as gateway:
        host, port = gateway.address.split(":")
        sent = json.dumps(body()).encode()
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST {ENTERPRISE}/img2img HTTP/1.1\r\nHost: x\r\nContent-Length: {len(sent)}\r\n\r\n"
        )
        writer.write(head.encode() + sent)
        await writer.drain()
        await asyncio.wait_for(accepted(gateway.stack, 10_000_001), SECONDS)
        writer.close()
        await writer.wait_closed()
        gateway.engine.release()
        watched = [message async for message in gateway.stack.api.watch("jobs/10000001")]
        assert watched[-1].event.WhichOneof("event") == "succeeded"


async def test_a_stop_answers_waiting_posts_ends_streams_and_returns() -> None:
    async with served_gateway() as gateway:
        sent = body(instant_response=True)
        job_id = (await gateway.http.post(f"{ENTERPRISE}/img2img", json=sent)).json()["id"]
        async with gateway.http.stream("GET", f"/v1/jobs/{job_id}/events", headers=KEY) as stream:
            lines = aiter(stream.aiter_lines())
            await asyncio.wait_for(lines_until(lines, "event: step"), SECONDS)
            waiting = asyncio.create_task(
                gateway.http.post(f"{ENTERPRISE}/img2img", json=body(seed=2))
            )
            await asyncio.wait_for(accepted(gateway.stack, 10_000_002), SECONDS)
            gateway.stop.set()
            assert (await waiting).json()["status"] == "processing"
            assert "event: succeeded" not in [line async for line in lines]
        async with asyncio.timeout(SECONDS):
            await gateway.task


async def test_a_body_that_is_too_large_gets_a_response_and_no_reset() -> None:
    async with served_gateway() as gateway:
        answer = await gateway.http.post(f"{ENTERPRISE}/img2img", content=b" " * (40 * 2**20))
        assert (answer.status_code, answer.json()["message"]) == (413, "Request body too large")
        assert (await gateway.http.get("/healthz")).status_code == 200


async def test_a_client_that_expects_100_continue_gets_413_before_it_sends_the_body() -> None:
    async with served_gateway() as gateway:
        host, port = gateway.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"POST {ENTERPRISE}/img2img HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            f"Content-Length: {10**10}\r\n\r\n".encode()
        )
        status = await asyncio.wait_for(reader.readline(), SECONDS)
        assert status.startswith(b"HTTP/1.1 413")
        writer.close()
        await writer.wait_closed()


async def test_the_gateway_talks_tls_to_an_api_that_has_it(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    roots, chain, private = (tmp_path / name for name in ("roots.pem", "chain.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(roots))
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    certificate.private_key_pem.write_to_path(str(private))
    config = settings(tls_cert_file=chain, tls_key_file=private)
    async with running_api(memory_bus(), config) as api:
        stranger = tmp_path / "stranger.pem"
        trustme.CA().cert_pem.write_to_path(str(stranger))
        for trusted, hint in (
            (roots, ""),
            (None, "it may have TLS, which needs IMG2IMG_API_CA_FILE"),
            (stranger, "IMG2IMG_API_CA_FILE does not hold what signed"),
        ):
            trusting = settings(api_address=api.address, api_ca_file=trusted)
            async with connect(trusting) as channel:
                trouble = await api_trouble(channel)
            assert hint in trouble
            assert bool(hint) == bool(trouble)
            assert "127.0.0.1" not in trouble, "/readyz must not reveal the address of the api"
    async with running_api(memory_bus(), settings()) as plain:
        trusting = settings(api_address=plain.address, api_ca_file=roots)
        async with connect(trusting) as channel:
            assert "the api has no TLS" in await api_trouble(channel)
    elsewhere = authority.issue_cert("api.internal")
    elsewhere.cert_chain_pems[0].write_to_path(str(chain))
    elsewhere.private_key_pem.write_to_path(str(private))
    async with running_api(memory_bus(), config) as api:
        trusting = settings(api_address=api.address, api_ca_file=roots)
        async with connect(trusting) as channel:
            trouble = await api_trouble(channel)
    assert "has no name that IMG2IMG_API_ADDRESS names" in trouble


def write_certificate(authority: trustme.CA, folder: Path, name: str) -> None:
    """Replaces NAME.pem, NAME-key.pem and the authority in NAME-ca.pem, as Kubernetes does."""
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(folder / f"{name}-ca.pem"))
    chain = folder / "chain.pem"
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    certificate.private_key_pem.write_to_path(str(folder / f"{name}-key.pem"))
    chain.replace(folder / f"{name}.pem")


async def test_certificates_of_both_sides_are_replaced_while_they_run(tmp_path: Path) -> None:
    write_certificate(trustme.CA(), tmp_path, "api")
    write_certificate(trustme.CA(), tmp_path, "gateway")
    config = settings(
        tls_cert_file=tmp_path / "api.pem",
        tls_key_file=tmp_path / "api-key.pem",
        tls_client_ca_file=tmp_path / "gateway-ca.pem",
    )
    async with running_api(memory_bus(), config) as api:
        trusting = settings(
            api_address=api.address,
            api_ca_file=tmp_path / "api-ca.pem",
            api_cert_file=tmp_path / "gateway.pem",
            api_key_file=tmp_path / "gateway-key.pem",
        )

        async def trouble_of_a_new_gateway(**changes: Path | None) -> str:
            async with connect(trusting.model_copy(update=changes)) as channel:
                return await api_trouble(channel)

        async with connect(trusting) as channel:
            assert not await api_trouble(channel)
            assert await trouble_of_a_new_gateway(api_cert_file=None)
            write_certificate(trustme.CA(), tmp_path, "api")
            write_certificate(trustme.CA(), tmp_path, "gateway")
            # The files are the authorities of a new pair: only those who read it again succeed.
            assert not await trouble_of_a_new_gateway()
            assert not await api_trouble(channel)
            (tmp_path / "api-key.pem").write_text("no key")
            with capture_logs() as logs:
                assert not await trouble_of_a_new_gateway()
            (line,) = [line for line in logs if "tls_files_rejected" in line["event"]]
            assert "IMG2IMG_TLS_KEY_FILE" in line["error"]
            (tmp_path / "api-ca.pem").write_text("no certificate")
            with capture_logs() as logs:
                assert not await api_trouble(channel)
            (line,) = [line for line in logs if "api_certificates_rejected" in line["event"]]
            assert "IMG2IMG_API_CA_FILE" in line["error"]


async def test_a_missing_file_of_certificates_is_an_error_of_the_start(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"IMG2IMG_API_CA_FILE: .*nothing\.pem cannot be read: No such"
    ):
        connect(settings(api_ca_file=tmp_path / "nothing.pem"))


async def test_a_taken_port_is_an_error_of_the_start() -> None:
    async with served_gateway() as gateway:
        port = int(gateway.address.split(":")[1])
        config = settings(api_address=gateway.stack.api.address, http_port=port)
        with pytest.raises(SettingsError, match=f"IMG2IMG_HTTP_PORT: 127.0.0.1:{port} is in use"):
            await serve(config, gateway.stack.worker.blobs, asyncio.Event())


def test_the_gateway_needs_no_numerics_and_little_memory() -> None:
    script = """
import asyncio, sys, psutil
from img2img_server.gateway.server import serve, serve_gateway
from img2img_server.settings import Settings
from img2img_server.testing.memory_blobs import MemoryBlobStore

async def main():
    stop = asyncio.Event()
    settings = Settings(http_port=0, metrics_port=0)
    await serve(settings, MemoryBlobStore(), stop, lambda _: stop.set())

asyncio.run(main())
heavy = {"torch", "diffusers", "transformers", "numpy", "PIL"} & set(sys.modules)
print(sorted(heavy), psutil.Process().memory_info().rss // 2**20)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy, megabytes = run.stdout.splitlines()[-1].rsplit(" ", 1)
    assert heavy == "[]"
    assert int(megabytes) <= 150
