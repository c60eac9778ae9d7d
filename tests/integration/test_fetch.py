"""Downloads of init images from real sockets; names get the addresses that the test says."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import Callable
from contextlib import suppress

import pytest
import structlog.testing
from aiohttp import web
from aiohttp.abc import ResolveResult
from web_peers import CDN, PICTURE, Names, fetch, listening, picture, redirect, serving

from img2img_server.domain.params import Limits
from img2img_server.images.base import FetchError, InvalidImageError
from img2img_server.images.fetch import fetch_image
from img2img_server.images.outbound import OutboundPolicy

PUBLIC_ONLY = OutboundPolicy()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_another_allowed_host_is_followed(status: int) -> None:
    names = Names("127.0.0.1")
    async with serving(web.get("/picture", picture)) as second:
        target = f"http://cdn.test:{second}/picture?signature=a%2Bb"
        async with serving(web.get("/", redirect(target, status))) as first:
            assert await fetch(f"http://files.test:{first}/", CDN, names) == PICTURE

    assert names.asked == ["files.test", "cdn.test"]


async def test_three_redirects_are_followed_and_a_fourth_is_not() -> None:
    names = Names("127.0.0.1")
    routes = [web.get(f"/{left}", redirect(f"{left - 1}")) for left in range(1, 5)]
    async with serving(*routes, web.get("/0", picture)) as port:
        assert await fetch(f"http://cdn.test:{port}/3", CDN, names) == PICTURE
        with pytest.raises(FetchError):
            await fetch(f"http://cdn.test:{port}/4", CDN, names)


async def test_a_body_without_end_is_cut_at_the_limit() -> None:
    names = Names("127.0.0.1")
    cut = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(2**16))
        finally:
            cut.set()

    async with serving(web.get("/", endless)) as port:
        url = f"http://cdn.test:{port}/"
        limits = Limits(max_image_bytes=2**20)
        with pytest.raises(InvalidImageError, match="must not be larger than 1 MB") as caught:
            await fetch_image(url, policy=CDN, resolver=names, limits=limits)
        await asyncio.wait_for(cut.wait(), 5)
    assert not isinstance(caught.value, FetchError)


async def test_a_body_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    names = Names("127.0.0.1")
    limit = Limits().max_image_bytes

    async def sized(request: web.Request) -> web.Response:
        return web.Response(body=bytes(int(request.query["size"])))

    async with serving(web.get("/", sized)) as port:
        url = f"http://cdn.test:{port}/?size="
        assert len(await fetch(f"{url}{limit}", CDN, names)) == limit
        with pytest.raises(InvalidImageError, match="must not be larger than 20 MB"):
            await fetch(f"{url}{limit + 1}", CDN, names)


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    names = Names("127.0.0.1")

    async def promise(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 10**12
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    async with serving(web.get("/", promise)) as port:
        with pytest.raises(InvalidImageError, match="must not be larger than 20 MB"):
            await fetch(f"http://cdn.test:{port}/", CDN, names)


async def slow_body(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    with suppress(ConnectionError):
        while True:
            await response.write(b".")
            await asyncio.sleep(0.02)
    return response


async def slow_headers(request: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("handler", [slow_body, slow_headers])
async def test_the_time_is_limited_in_all(
    handler: Callable[[web.Request], web.StreamResponse],
) -> None:
    names = Names("127.0.0.1")
    async with serving(web.get("/", handler), web.get("/go", redirect("/"))) as port:
        with pytest.raises(FetchError):
            await fetch(f"http://cdn.test:{port}/go", CDN, names, timeout_seconds=0.3)


async def test_a_name_server_that_does_not_answer_counts_too() -> None:
    class Silent(Names):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(FetchError):
        await fetch("http://slow.test/", PUBLIC_ONLY, Silent(), timeout_seconds=0.1)


async def test_a_name_without_address_and_a_closed_port_fail() -> None:
    async with listening() as listener:
        port = listener.port
    for url in ("http://nowhere.test/", f"http://cdn.test:{port}/"):
        with pytest.raises(FetchError):
            await fetch(url, CDN, Names(nowhere_test=[[]], cdn_test=[["127.0.0.1"]]))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "GZIP", "gzip, gzip"])
async def test_an_encoded_body_is_refused(encoding: str) -> None:
    names = Names("127.0.0.1")
    asked = []

    async def packed(request: web.Request) -> web.Response:
        asked.append(request.headers["Accept-Encoding"])
        return web.Response(body=gzip.compress(PICTURE), headers={"Content-Encoding": encoding})

    async with serving(web.get("/", packed)) as port:
        with pytest.raises(FetchError):
            await fetch(f"http://cdn.test:{port}/", CDN, names)
    assert asked == ["identity"]


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 500, 503])
async def test_only_status_200_counts(status: int) -> None:
    names = Names("127.0.0.1")

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=b"" if status in (204, 304) else PICTURE)

    async with serving(web.get("/", answer)) as port:
        with pytest.raises(FetchError):
            await fetch(f"http://cdn.test:{port}/", CDN, names)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: //\xff\xfe/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0\0\0\0",
        b"",
    ],
)
async def test_a_broken_answer_is_a_failed_download(answer: bytes) -> None:
    names = Names("127.0.0.1")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(FetchError):
            await fetch(f"http://cdn.test:{port}/", CDN, names, timeout_seconds=2)


async def test_nothing_of_one_host_reaches_another(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names("127.0.0.1")
    seen: list[dict[str, str]] = []

    async def set_cookie(request: web.Request) -> web.Response:
        response = web.Response(status=302, headers={"Location": "/next"})
        response.set_cookie("session", "secret")
        return response

    async def note(request: web.Request) -> web.Response:
        seen.append(dict(request.headers))
        return web.Response(body=PICTURE)

    async with listening() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        async with serving(web.get("/", set_cookie), web.get("/next", note)) as port:
            await fetch(f"http://cdn.test:{port}/?token=1", CDN, names)
        assert proxy.connections == 0
    assert seen == [
        {
            "Host": f"cdn.test:{port}",
            "Accept": "image/png, image/jpeg, image/webp, */*;q=0.1",
            "Accept-Encoding": "identity",
            "User-Agent": "img2img",
        }
    ]


async def test_the_log_tells_the_reason_and_no_secret() -> None:
    with structlog.testing.capture_logs() as lines, pytest.raises(FetchError):
        await fetch("http://10.0.0.1/a.png?token=secret#x", PUBLIC_ONLY, Names())
    with structlog.testing.capture_logs() as more, pytest.raises(FetchError):
        await fetch("http://user:secret@public.test/a.png", PUBLIC_ONLY, Names())

    event = {"event": "init image not fetched", "log_level": "info"}
    reason = "10.0.0.1 has an address that is not public: 10.0.0.1"
    assert lines == [{**event, "reason": reason, "url": "http://10.0.0.1/a.png"}]
    assert more == [{**event, "reason": "user part", "url": "http://public.test/a.png"}]


async def test_local_mode_fetches_from_this_machine_by_name_and_by_address() -> None:
    local = OutboundPolicy.parse("127.0.0.0/8, ::1, localhost")
    async with serving(web.get("/", picture)) as port:
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{port}/"
            assert await fetch_image(url, policy=local, limits=Limits()) == PICTURE


async def test_a_caller_that_gives_up_closes_the_connection() -> None:
    names = Names("127.0.0.1")
    reached, left = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        reached.set()
        await reader.read()
        left.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        task = asyncio.create_task(fetch(f"http://cdn.test:{port}/", CDN, names))
        await asyncio.wait_for(reached.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(left.wait(), 5)
