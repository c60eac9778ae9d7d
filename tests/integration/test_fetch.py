"""Downloads of init images over real sockets. The test's resolver maps the names."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
import structlog.testing
import trustme
from aiohttp import web
from aiohttp.abc import ResolveResult
from web_peers import (
    CDN,
    IMAGE,
    RESET,
    Names,
    answer,
    fetch,
    image,
    listening,
    origin,
    redirect,
    serving,
)

from img2img_server import __version__
from img2img_server.domain.params import Limits
from img2img_server.imaging.base import FetchError, InvalidImageError
from img2img_server.imaging.fetch import fetch_image
from img2img_server.outbound.causes import cause_of
from img2img_server.outbound.policy import OutboundPolicy
from tests.stack import settings

PUBLIC_ONLY = OutboundPolicy()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_server.imaging.fetch.FIRST_PAUSE_SECONDS", 0.001)


async def cause_of_failure(url: str, **more: object) -> str:
    """Returns the caller's error message for a failed download from a named host."""
    with pytest.raises(FetchError) as caught:
        await fetch(url, CDN, Names("127.0.0.1"), **more)
    return caught.value.violation.cause


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_another_allowed_host_is_followed(status: int) -> None:
    names = Names("127.0.0.1")
    async with serving(web.get("/picture", image)) as second:
        target = f"http://cdn.test:{second}/picture?signature=a%2Bb"
        async with serving(web.get("/", redirect(target, status))) as first:
            assert await fetch(f"http://files.test:{first}/", CDN, names) == IMAGE

    assert names.asked == ["files.test", "cdn.test"]


async def test_three_redirects_are_followed_and_a_fourth_is_not() -> None:
    names = Names("127.0.0.1")
    routes = [web.get(f"/{left}", redirect(f"{left - 1}")) for left in range(1, 5)]
    async with serving(*routes, web.get("/0", image)) as port:
        assert await fetch(f"http://cdn.test:{port}/3", CDN, names) == IMAGE
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
        await asyncio.wait_for(cut.wait(), 30)
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


@pytest.mark.parametrize("coding", ["gzip", "gzip, aws-chunked", "aws-chunked", "", "identity,"])
async def test_content_codings_are_read_as_a_list_and_undone(coding: str) -> None:
    names = Names("127.0.0.1")
    asked = []

    async def packed(request: web.Request) -> web.Response:
        asked.append(request.headers["Accept-Encoding"])
        body = gzip.compress(IMAGE) if "gzip" in coding else IMAGE
        return web.Response(body=body, headers={"Content-Encoding": coding})

    async with serving(web.get("/", packed)) as port:
        assert await fetch(f"http://cdn.test:{port}/", CDN, names) == IMAGE
    assert asked == ["identity"]


async def test_a_coding_that_cannot_be_decoded_is_named() -> None:
    packed = answer(200, b"\x0b\x02\x80ab\x03", "Content-Encoding: br")
    async with origin(packed) as server:
        cause = await cause_of_failure(f"http://cdn.test:{server.port}/")
    assert cause == "the server sent it with Content-Encoding br, which is not supported"


async def test_a_packed_body_is_held_against_the_byte_limit() -> None:
    packed = answer(200, gzip.compress(bytes(2**20 + 1)), "Content-Encoding: gzip")
    async with origin(packed) as server:
        url, limits = f"http://cdn.test:{server.port}/", Limits(max_image_bytes=2**20)
        with pytest.raises(InvalidImageError, match="must not be larger than 1 MB"):
            await fetch_image(url, policy=CDN, resolver=Names("127.0.0.1"), limits=limits)


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 500, 503])
async def test_only_status_200_counts(status: int) -> None:
    names = Names("127.0.0.1")

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=status, body=b"" if status in (204, 304) else IMAGE)

    async with serving(web.get("/", refuse)) as port:
        with pytest.raises(FetchError):
            await fetch(f"http://cdn.test:{port}/", CDN, names)


@pytest.mark.parametrize(
    "broken",
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
async def test_a_broken_answer_is_a_failed_download(broken: bytes) -> None:
    names = Names("127.0.0.1")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(broken)
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
        return web.Response(body=IMAGE)

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
            "User-Agent": f"img2img/{__version__}",
        }
    ]


async def test_the_log_tells_the_reason_and_no_secret() -> None:
    with structlog.testing.capture_logs() as lines, pytest.raises(FetchError):
        await fetch("http://10.0.0.1/a.png?token=secret#x", PUBLIC_ONLY, Names())
    with structlog.testing.capture_logs() as more, pytest.raises(FetchError):
        await fetch("http://user:secret@public.test/a.png", PUBLIC_ONLY, Names())

    event = {"event": "init_image_not_fetched", "log_level": "info", "retries": 0}
    reason = "10.0.0.1 has an address that is not public: 10.0.0.1"
    assert lines == [{**event, "reason": reason, "url": "http://10.0.0.1/a.png"}]
    user_part = "the address contains a user name or password (user@host), which is not supported"
    assert more == [{**event, "reason": user_part, "url": "http://public.test/a.png"}]


async def test_local_mode_fetches_from_this_machine_by_name_and_by_address() -> None:
    local = OutboundPolicy.parse("127.0.0.0/8, ::1, localhost")
    async with serving(web.get("/", image)) as port:
        for host in ("127.0.0.1", "localhost"):
            url = f"http://{host}:{port}/"
            assert await fetch_image(url, policy=local, limits=Limits()) == IMAGE


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
        await asyncio.wait_for(reached.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(left.wait(), 30)


@pytest.mark.parametrize(
    "transient",
    [
        *(answer(status) for status in (429, 500, 502, 503, 504)),
        answer(200, IMAGE)[:-1],
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nshort\r\n",
        b"",
        RESET,
        answer(200, IMAGE)[:-99] + RESET,
    ],
)
async def test_what_may_pass_is_tried_at_most_twice_more(transient: bytes) -> None:
    async with origin(transient, transient, answer(200, IMAGE)) as server:
        url = f"http://cdn.test:{server.port}/a"
        with structlog.testing.capture_logs() as lines:
            assert await fetch(url, CDN, Names("127.0.0.1")) == IMAGE
        assert server.targets == ["/a HTTP/1.1"] * 3
    reported = [(line["event"], line["retries"]) for line in lines]
    assert reported == [("init_image_fetched_after_retries", 2)]
    async with origin(transient) as server:
        with structlog.testing.capture_logs() as lines:
            await cause_of_failure(f"http://cdn.test:{server.port}/a")
        assert len(server.requests) == 3
    assert [(line["event"], line["retries"]) for line in lines] == [("init_image_not_fetched", 2)]


@pytest.mark.parametrize(
    "headers",
    [
        [f"Content-Security-Policy: {'a' * 30_000}"],
        [f"Set-Cookie: {number}={'a' * 200}" for number in range(300)],
    ],
)
async def test_large_response_headers_are_read(headers: list[str]) -> None:
    async with origin(answer(200, IMAGE, *headers)) as server:
        assert await fetch(f"http://cdn.test:{server.port}/", CDN, Names("127.0.0.1")) == IMAGE


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451, 501])
async def test_a_refusal_is_final(status: int) -> None:
    async with origin(answer(status, b"no", "Retry-After: 0"), answer(200, IMAGE)) as server:
        cause = await cause_of_failure(f"http://cdn.test:{server.port}/")
        assert cause == f"the server answered {status}"
        assert len(server.requests) == 1


async def test_the_target_of_a_redirect_is_tried_again_and_not_the_redirect() -> None:
    away = answer(302, b"", "Location: /b%2f")
    async with origin(away, answer(503), answer(503), answer(200, IMAGE)) as server:
        assert await fetch(f"http://cdn.test:{server.port}/a", CDN, Names("127.0.0.1")) == IMAGE
        assert server.targets == ["/a HTTP/1.1"] + ["/b%2f HTTP/1.1"] * 3


async def test_a_small_retry_after_is_waited_for_and_a_large_one_is_not() -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def asked_for(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("img2img_server.imaging.fetch.asyncio.sleep", asked_for)
        async with origin(answer(429, b"", "Retry-After: 2"), answer(200, IMAGE)) as server:
            url = f"http://cdn.test:{server.port}/"
            assert await fetch(url, CDN, Names("127.0.0.1")) == IMAGE
        async with origin(answer(503, b"", "Retry-After: 60")) as server:
            cause = await cause_of_failure(f"http://cdn.test:{server.port}/")
            assert cause == "the server answered 503"
            assert len(server.requests) == 1
    assert pauses == [2.0]


async def test_the_cause_of_a_failed_download_reaches_the_caller() -> None:
    host, broken = "http://cdn.test:{port}/", "the connection broke before the server answered"
    causes = {
        answer(403): "the server answered 403",
        answer(302): "the server answered 302 without a Location",
        answer(302, b"", "Location: /"): "too many redirects, more than 3",
        answer(302, b"", "Location: ftp://a/"): "the address does not begin with http:// or "
        "https:// (after a redirect)",
        answer(302, b"", "Location: http://10.0.0.1:81/"): "the address is not public "
        "(after a redirect)",
        answer(200, b"x" * 99)[:-9]: "the connection broke after 90 bytes",
        b"": broken,
        RESET: broken,
        b"SSH-2.0-OpenSSH_9.2\r\n": "the server did not answer with valid HTTP",
    }
    found = {}
    for sent in causes:
        async with origin(sent) as server:
            found[sent] = await cause_of_failure(host.format(port=server.port))
    assert found == causes


async def test_the_cause_names_what_the_caller_sent_and_no_address_behind_it() -> None:
    refused = socket.socket()
    refused.bind(("127.0.0.1", 0))  # The socket is bound but does not listen.
    port = refused.getsockname()[1]
    with refused:
        cause = await cause_of_failure(f"http://cdn.test:{port}/")
    assert cause == "no connection to cdn.test: connection refused"
    for url, names, wanted in (
        ("http://inside.test/", Names("10.1.2.3"), "the address is not public"),
        ("http://169.254.169.254/", Names(), "the address is not public"),
        (
            "http://nowhere.test/",
            Names(nowhere_test=[[]]),
            "the name nowhere.test cannot be resolved",
        ),
        ("http://public.test:25/", Names(), "port 25 is not a port for HTTP"),
        ("http://0x7f.1/", Names(), "the host is an IP address in a spelling that is not accepted"),
    ):
        with pytest.raises(FetchError) as caught:
            await fetch(url, PUBLIC_ONLY, names)
        assert caught.value.violation.cause == wanted


async def test_a_slow_server_is_reported_from_one_that_does_not_answer() -> None:
    async with serving(web.get("/", slow_body), web.get("/never", slow_headers)) as port:
        url = f"http://cdn.test:{port}/"
        never = await cause_of_failure(f"{url}never", timeout_seconds=0.2)
        slow = await cause_of_failure(url, timeout_seconds=0.2)
    assert never == "the server did not answer within 0.2 s"
    assert slow.startswith("the server did not send the whole image within 0.2 s; ")
    assert slow.endswith(" bytes had arrived")


async def test_a_certificate_that_is_not_valid_is_reported_with_its_fault() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("cdn.test").configure_cert(context)
    async with origin(tls=context) as server:
        cause = await cause_of_failure(f"https://cdn.test:{server.port}/")
        assert len(server.requests) == 0
    wanted = "the TLS certificate of cdn.test is not valid: unable to get local issuer certificate"
    assert cause == wanted


def test_a_certificate_for_another_host_does_not_name_the_host_of_a_redirect() -> None:
    inner = ssl.SSLCertVerificationError(1, "certificate verify failed")
    inner.verify_message = "Hostname mismatch, certificate is not valid for 'inside.test'."
    key: Any = None  # the port of the connection, which only the error's own text contains
    cause = cause_of(aiohttp.ClientConnectorCertificateError(key, inner), "the host of a redirect")
    assert cause == "the TLS certificate of the host of a redirect is not valid: Hostname mismatch"


async def test_a_server_without_tls_is_reported() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ready\r\n")
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        cause = await cause_of_failure(f"https://cdn.test:{port}/")
    assert cause.startswith("the TLS connection to cdn.test failed: ")


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/a%28b%29?X-Sig=%2f%2B%3a&e=", "/a%28b%29?X-Sig=%2f%2B%3a&e="),
        ("/a?", "/a?"),
        ("/ü".encode().decode("latin-1"), "/%C3%BC"),
        ("/\xfc", "/%FC"),
        ("/a b#c", "/a%20b"),
        ("sub/../%7e", "/%7e"),
        ("?%7E", "/start?%7E"),
    ],
)
async def test_the_target_of_a_redirect_is_requested_as_it_was_sent(
    location: str, target: str
) -> None:
    redirected = answer(302, b"", f"Location: {location}")
    async with origin(redirected, answer(200, IMAGE)) as server:
        url = f"http://cdn.test:{server.port}/start?q"
        assert await fetch(url, CDN, Names("127.0.0.1")) == IMAGE
        assert server.targets == ["/start?q HTTP/1.1", f"{target} HTTP/1.1"]


async def test_requests_name_the_product_or_what_the_setting_says() -> None:
    named = "img2img/9 (+https://example.com/contact)"
    async with origin() as server:
        url = f"http://cdn.test:{server.port}/"
        for setting in ("", named):
            policy = OutboundPolicy.of(
                settings(outbound_allow="cdn.test", outbound_user_agent=setting)
            )
            await fetch(url, policy, Names("127.0.0.1"))
    agents = [
        line.decode()
        for request in server.requests
        for line in request.split(b"\r\n")
        if line.startswith(b"User-Agent: ")
    ]
    assert agents == [f"User-Agent: img2img/{__version__}", f"User-Agent: {named}"]
