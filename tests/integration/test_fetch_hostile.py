"""Forbidden addresses are rejected before any connection: their listener gets none."""

from __future__ import annotations

import asyncio

import hostile_urls
import pytest
from aiohttp import web
from web_peers import CDN, IMAGE, Names, fetch, image, listening, redirect, serving

from img2img_server.imaging.base import FetchError
from img2img_server.outbound.policy import ForbiddenAddressError, OutboundPolicy

PUBLIC_ONLY = OutboundPolicy()


async def test_no_address_of_the_corpus_is_contacted() -> None:
    async with listening() as listener:
        for text in hostile_urls.ALL:
            url = text.replace("PORT", str(listener.port))
            names = Names("127.0.0.1")
            with pytest.raises(FetchError):
                await fetch(url, PUBLIC_ONLY, names, timeout_seconds=2)
            assert names.asked == [] or text in hostile_urls.NAMES, text
        assert listener.connections == 0


async def test_the_listener_would_have_received_the_request() -> None:
    everything = OutboundPolicy.parse("0.0.0.0/0, ::/0")
    async with listening() as listener:
        for host in ("127.0.0.1", "127.1.2.3", "0.0.0.0", "anything.test"):
            url = f"http://{host}:{listener.port}/"
            assert await fetch(url, everything, Names("127.0.0.1")) == b"secret"
        assert listener.connections == 4


@pytest.mark.parametrize("address", hostile_urls.FORBIDDEN_ADDRESSES)
async def test_a_name_with_one_forbidden_address_among_public_ones_is_refused(address: str) -> None:
    async with listening() as listener:
        names = Names("192.88.98.1", address)
        with pytest.raises(FetchError):
            await fetch(f"http://mixed.test:{listener.port}/", PUBLIC_ONLY, names)
        assert names.asked == ["mixed.test"]
        assert listener.connections == 0


async def test_no_redirect_to_the_corpus_is_followed() -> None:
    names = Names("127.0.0.1")
    location = b""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        if asked.startswith(b"GET /go "):
            writer.write(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n")
        else:  # The reference names this server.
            writer.write(b"HTTP/1.1 404 Not Found\r\n")
        writer.write(b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    start = f"http://cdn.test:{server.sockets[0].getsockname()[1]}/go"
    async with server, listening() as listener:
        for text in hostile_urls.ALL:
            location = text.replace("PORT", str(listener.port)).encode()
            with pytest.raises(FetchError):
                await fetch(start, CDN, names, timeout_seconds=2)
        assert listener.connections == 0


async def test_a_chain_that_ends_at_a_private_name_is_cut_there() -> None:
    names = Names("127.0.0.1")
    async with listening() as listener:
        routes = [
            web.get("/a", redirect("/b")),
            web.get("/b", redirect(f"http://intranet.test:{listener.port}/")),
        ]
        async with serving(*routes) as port:
            with pytest.raises(FetchError):
                await fetch(f"http://cdn.test:{port}/a", CDN, names)
        assert names.asked[-1] == "intranet.test"
        assert listener.connections == 0


async def test_an_answer_that_changes_between_check_and_connect_changes_nothing() -> None:
    policy = OutboundPolicy.parse("127.0.0.1/32")
    async with serving(web.get("/", image)) as port, listening("127.0.0.2", port) as listener:
        names = Names(rebind_test=[["127.0.0.1"], ["127.0.0.2"]])
        url = f"http://rebind.test:{port}/"

        assert await fetch(url, policy, names) == IMAGE
        assert names.asked == ["rebind.test"]
        with pytest.raises(FetchError):
            await fetch(url, policy, names)
        assert names.asked == ["rebind.test"] * 2
        assert listener.connections == 0


async def test_a_redirect_to_the_same_name_is_checked_again() -> None:
    policy = OutboundPolicy.parse("127.0.0.1/32")

    async def close_and_redirect(request: web.Request) -> web.Response:
        headers = {"Location": "/", "Connection": "close"}
        return web.Response(status=302, headers=headers)

    async with (
        serving(web.get("/go", close_and_redirect), web.get("/", image)) as port,
        listening("127.0.0.2", port) as listener,
    ):
        names = Names(rebind_test=[["127.0.0.1"], ["127.0.0.2"]])
        with pytest.raises(FetchError):
            await fetch(f"http://rebind.test:{port}/go", policy, names)
        assert names.asked == ["rebind.test"] * 2
        assert listener.connections == 0


async def test_a_session_checks_requests_that_were_not_checked_before() -> None:
    async with listening() as listener, PUBLIC_ONLY.open_session(Names("127.0.0.1")) as session:
        for host in ("127.0.0.1", "[::1]", "public.test", "0x7f.1", "127.1"):
            with pytest.raises(ForbiddenAddressError):
                await session.get(f"http://{host}:{listener.port}/")
        assert listener.connections == 0


async def test_a_session_checks_the_redirects_that_it_follows_by_itself() -> None:
    names = Names("127.0.0.1")
    async with listening() as listener:
        target = f"http://127.0.0.1:{listener.port}/"
        async with (
            serving(web.get("/", redirect(target))) as port,
            CDN.open_session(names) as session,
        ):
            with pytest.raises(ForbiddenAddressError):
                await session.get(f"http://cdn.test:{port}/")
        assert listener.connections == 0
