"""Clients that hold connections, headers, bodies or responses open, and the other clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY
from receiver import until

from img2img_server.gateway.http import connections, http_request, middleware
from tests.http_stack import ENTERPRISE, ServedGateway, served_gateway

PATH = f"{ENTERPRISE}/img2img"
STRANGER, OTHER = "127.0.0.2", "127.0.0.3"
KEY = {"Authorization": "Bearer dev-key"}
MIB = 2**20
SECONDS = 60.0


class Socket:
    """A connection to the gateway from an address of this machine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def status(self) -> str:
        """Returns the status of the response, or "closed"."""
        async with asyncio.timeout(SECONDS):
            with suppress(ConnectionError):
                line = await self.reader.readline()
                return line[9:12].decode() or "closed"
        return "closed"

    async def trickle(self, data: bytes) -> int:
        """Sends a byte every 50 ms until the gateway closes the connection. Returns how many."""
        sent = 0
        async with asyncio.timeout(SECONDS):
            with suppress(ConnectionError):
                while not self.reader.at_eof():
                    self.writer.write(data)
                    await self.writer.drain()
                    sent += 1
                    await asyncio.sleep(0.05)
        return sent


@asynccontextmanager
async def sockets(
    gateway: ServedGateway, data: bytes, *, source: str = STRANGER, count: int = 1
) -> AsyncIterator[list[Socket]]:
    """Yields connections on which this data was sent."""
    host, port = gateway.address.split(":")
    opened = []
    try:
        for _ in range(count):
            pair = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
            opened.append(Socket(*pair))
            with suppress(ConnectionError):
                opened[-1].writer.write(data)
                await opened[-1].writer.drain()
        yield opened
    finally:
        for each in opened:
            each.writer.close()


def post(length: int, beginning: bytes, *, path: str = PATH, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{more}\r\n"
    return head.encode() + beginning


async def ask(gateway: ServedGateway, source: str, *, headers: Any = None, **fields: Any) -> int:
    """Returns the status of a request that needs a valid key."""
    transport = httpx.AsyncHTTPTransport(local_address=source)
    async with httpx.AsyncClient(
        base_url=f"http://{gateway.address}", transport=transport, timeout=SECONDS
    ) as http:
        sent = json.dumps(fields)
        found = await http.post(f"{ENTERPRISE}/fetch/1", content=sent, headers=headers)
        return found.status_code


def used(budget: str) -> float:
    labels = {"budget": budget}
    return REGISTRY.get_sample_value("img2img_budget_used", labels) or 0.0


async def used_by_peers() -> float:
    return used("http body bytes without a key")


async def open_connections() -> float:
    return REGISTRY.get_sample_value("img2img_http_connections") or 0.0


async def test_large_bodies_without_a_key_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(middleware, "PEER_BYTES", 4 * MIB)
    async with served_gateway() as gateway:
        attack = post(32 * MIB, b'{"prompt": "' + b"a" * (3 * MIB // 2))
        async with sockets(gateway, attack, count=4):
            await until(used_at_least(MIB), True)
            assert await used_by_peers() <= 2 * MIB + 64 * 1024

            filling = "x" * MIB
            asked = {
                "key in a header": ask(gateway, STRANGER, headers=KEY, filling=filling),
                "key first": ask(gateway, STRANGER, key="dev-key", filling=filling),
                "key last, from another address": ask(
                    gateway, OTHER, filling=filling, key="dev-key"
                ),
            }
            codes = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
            assert codes == dict.fromkeys(asked, 404)
            # Without a key, this address has no more room.
            assert await ask(gateway, STRANGER, filling="x" * 2 * MIB) == 503
            assert (await gateway.http.get("/healthz")).status_code == 200
        await until(used_by_peers, 0.0)


def used_at_least(size: int) -> Any:
    async def check() -> bool:
        return await used_by_peers() >= size

    return check


async def test_a_body_below_the_minimum_rate_ends_and_frees_its_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_request, "_PART_SECONDS", 0.5)
    async with served_gateway() as gateway:
        # The first megabyte came fast, so the mean rate stays high.
        async with sockets(gateway, post(2 * MIB, b" " * MIB)) as (stalled,):
            trickling = asyncio.create_task(stalled.trickle(b" "))
            assert await stalled.status() == "408"
            await until(used_by_peers, 0.0)
            trickling.cancel()
        with_key = post(2 * MIB, b" ", more="X-API-Key: dev-key\r\n")
        async with sockets(gateway, with_key) as (stalled,):
            assert await stalled.status() == "408"
        assert used("http body bytes") == 0


async def test_a_slow_body_above_the_minimum_rate_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_request, "_PART_SECONDS", 1.0)
    parts = 5
    async with served_gateway() as gateway:
        size = parts * http_request._PART_BYTES
        sent = post(size, b"", path=f"{ENTERPRISE}/fetch/1", more="X-API-Key: dev-key\r\n")
        async with sockets(gateway, sent) as (slow,):
            for _ in range(parts):
                await asyncio.sleep(0.4)  # in all longer than a part may take
                slow.writer.write(b" " * http_request._PART_BYTES)
                await slow.writer.drain()
            assert await slow.status() == "404"


@pytest.mark.parametrize("beginning", [post(1000, b"{"), b"GET / HTTP/1.1\r\nX-A: ", b""])
async def test_many_connections_of_one_address_leave_room_for_others(beginning: bytes) -> None:
    async with (
        served_gateway(max_http_requests=40, trusted_proxies="") as gateway,
        sockets(gateway, beginning, count=60),
    ):
        assert await open_connections() <= 21
        assert await ask(gateway, OTHER, key="dev-key") == 404
        # The same address: its oldest connection without a key gives way.
        assert await ask(gateway, STRANGER, key="dev-key") == 404
        assert await ask(gateway, STRANGER, headers=KEY) == 404
        assert (await gateway.http.get("/healthz")).status_code == 200


async def test_connections_of_a_proxy_without_a_client_have_no_share_but_give_way() -> None:
    async with (
        served_gateway(max_http_requests=40, trusted_proxies=STRANGER) as gateway,
        sockets(gateway, b"", count=60),
    ):
        await until(open_connections, 40.0)
        assert await ask(gateway, OTHER, key="dev-key") == 404
        assert await ask(gateway, STRANGER, key="dev-key") == 404


async def test_forwarded_addresses_are_used_only_from_trusted_proxies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(middleware, "PEER_BYTES", 4 * MIB)
    attack = post(32 * MIB, b" " * (3 * MIB // 2), more="X-Forwarded-For: 192.0.2.1\r\n")
    filling = "x" * MIB
    async with served_gateway(trusted_proxies=f"10.0.0.0/8, {STRANGER}") as gateway:
        async with sockets(gateway, attack):
            await until(used_at_least(MIB), True)
            codes = [
                await ask(gateway, source, headers={"X-Forwarded-For": client}, filling=filling)
                for source, client in (
                    (STRANGER, "192.0.2.1"),
                    (STRANGER, "198.51.100.7, 192.0.2.1"),  # A proxy appends what it sees.
                    (STRANGER, "192.0.2.2"),
                    (OTHER, "192.0.2.1"),
                )
            ]
        assert codes == [503, 503, 401, 401]


async def test_headers_that_do_not_end_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.STATE_SECONDS, "header", 0.5)
    async with served_gateway() as gateway:
        begun = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
        async with sockets(gateway, begun) as (first,), sockets(gateway, b"") as (silent,):
            await first.trickle(b"a")
            assert await silent.status() == "closed"
        async with sockets(gateway, begun + b"\r\n" + begun) as (second,):
            assert await second.status() == "200"
            await second.trickle(b"a")


async def test_empty_lines_do_not_keep_an_idle_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    for state in ("header", "idle"):
        monkeypatch.setitem(connections.STATE_SECONDS, state, 0.5)
    async with (
        served_gateway() as gateway,
        sockets(gateway, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as (idle,),
    ):
        assert await idle.status() == "200"
        await idle.trickle(b"\r\n")


async def test_a_body_that_no_endpoint_reads_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.STATE_SECONDS, "unread_body", 0.5)
    async with (
        served_gateway() as gateway,
        sockets(gateway, post(MIB, b"a", path="/nowhere")) as (waiting,),
    ):
        assert await waiting.status() == "404"
        await waiting.trickle(b"a")


async def test_a_response_that_is_not_read_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.STATE_SECONDS, "response", 0.5)
    name = "generations/3f8a1c52-6d0e-4b7a-9c41-5e2d7f90ab16-0.png"
    async with served_gateway() as gateway:
        await gateway.stack.worker.blobs.put(name, bytes(20 * MIB), "image/png")
        asked = f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        before = await open_connections()
        async with sockets(gateway, asked):
            await until(open_connections, before + 1)
            await until(open_connections, before)


async def test_the_first_key_counts_and_a_wrong_one_in_a_header_refuses_no_right_one() -> None:
    wrong = {"Authorization": "Bearer wrong"}
    async with served_gateway() as gateway:
        assert await ask(gateway, OTHER, headers=wrong, key="dev-key") == 404
        assert await ask(gateway, OTHER, headers=KEY, key="wrong") == 401
        assert await ask(gateway, OTHER, headers=wrong) == 401
        both = {"Authorization": "Bearer wrong", "X-API-Key": "dev-key"}
        assert await ask(gateway, OTHER, headers=both) == 401
