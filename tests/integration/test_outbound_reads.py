"""Reading from a hostile server costs a bounded amount, and the event loop keeps its turns.

The tests measure the CPU time of a turn instead of the time on the clock, which depends on the load
of the machine.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from hostile_server import hostile_server
from web_peers import CDN, Names, answer, fetch, origin

from img2img_server.domain.storage import StorageDetails
from img2img_server.errors import StorageError
from img2img_server.imaging.base import FetchError, InvalidImageError
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.outbound.reading import OVERHEAD_BYTES
from img2img_server.storage import tenant_s3
from img2img_server.storage.tenant_s3 import TenantS3
from img2img_server.webhooks.sender import webhook_sender

NAMES = Names("127.0.0.1")
AT_ONCE = 4
# One read of 256 KiB of these responses takes 50 to 100 ms, and each of the connections reads once
# in a turn. With small reads that share the turn, it takes 2 ms, or 50 ms with a garbage
# collection.
TURN_CPU_SECONDS = 0.15
# Time limit of operations that end for another reason.
AMPLE_SECONDS = 20.0

OVERHEAD = "the server sent more than 128 KiB of headers and other data without content"
TOO_LATE = "the server did not "
CAUSES = {
    "continue": OVERHEAD,
    "short-continue": OVERHEAD,
    "early-hints": OVERHEAD,
    "early-hints-with-headers": OVERHEAD,
    "chunks-of-1-byte": OVERHEAD,
    "chunks-of-16-bytes": OVERHEAD,
    "chunk-extension": OVERHEAD,
    "chunk-extensions": OVERHEAD,
    "folded-header": OVERHEAD,
    "empty-lines": OVERHEAD,
    "redirects-after-continue": f"{OVERHEAD} (after a redirect)",
    "gzip-members": "the server sent it in more than 64 gzip members",
}
# aiohttp's own limits end these; a retry may exceed the budget first.
TOO_LONG = ("headers", "header-line", "trailers", "reason-phrase")
TRICKLED = (
    "trickled-content",
    "trickled-headers",
    "trickled-chunks",
    "trickled-continue",
    "silence",
)
BEFORE_THE_HEADERS = ("continue", "early-hints-with-headers", "empty-lines")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_server.imaging.fetch.FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(tenant_s3, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture(scope="module")
def http_port() -> Iterator[int]:
    with hostile_server() as port:
        yield port


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yields the certificate of cdn.test, whose authority this process trusts."""
    authority, folder = trustme.CA(), tmp_path_factory.mktemp("tls")
    certificate = folder / "server.pem"
    authority.issue_cert("cdn.test").private_key_and_cert_chain_pem.write_to_path(str(certificate))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", context)
        yield certificate


@dataclass
class Turns:
    """The longest CPU time that the thread used in a turn of its event loop."""

    longest_cpu_seconds: float = 0.0


@asynccontextmanager
async def measured_turns() -> AsyncIterator[Turns]:
    turns = Turns()

    async def measure() -> None:
        while True:
            begin = time.thread_time()
            await asyncio.sleep(0)
            turns.longest_cpu_seconds = max(turns.longest_cpu_seconds, time.thread_time() - begin)

    # A full collection would traverse the objects of all earlier tests in a turn.
    gc.collect()
    gc.freeze()
    task = asyncio.create_task(measure())
    try:
        yield turns
    finally:
        gc.unfreeze()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def cause_of_failure(url: str, seconds: float = AMPLE_SECONDS) -> str:
    with pytest.raises(FetchError) as caught:
        await fetch(url, CDN, NAMES, timeout_seconds=seconds)
    return caught.value.violation.cause


@pytest.mark.parametrize("name", CAUSES)
async def test_a_hostile_server_ends_its_download_and_leaves_the_loop_its_turns(
    name: str, http_port: int
) -> None:
    async with measured_turns() as turns:
        url = f"http://cdn.test:{http_port}/{name}"
        causes = await asyncio.gather(*(cause_of_failure(url) for _ in range(AT_ONCE)))
    assert causes == [CAUSES[name]] * AT_ONCE
    assert turns.longest_cpu_seconds < TURN_CPU_SECONDS


@pytest.mark.parametrize("name", TOO_LONG)
async def test_endless_headers_end_their_download(name: str, http_port: int) -> None:
    async with measured_turns() as turns:
        url = f"http://cdn.test:{http_port}/{name}"
        causes = await asyncio.gather(*(cause_of_failure(url) for _ in range(AT_ONCE)))
    assert not any(f"within {AMPLE_SECONDS:g} s" in cause for cause in causes), causes
    assert turns.longest_cpu_seconds < TURN_CPU_SECONDS


async def test_endless_content_is_cut_at_the_limit_of_images(http_port: int) -> None:
    async with measured_turns() as turns:
        with pytest.raises(InvalidImageError, match="must not be larger than 20 MB"):
            await fetch(f"http://cdn.test:{http_port}/content", CDN, NAMES)
    assert turns.longest_cpu_seconds < TURN_CPU_SECONDS


@pytest.mark.parametrize("name", TRICKLED)
async def test_a_slow_server_ends_its_download_at_the_time_limit(name: str, http_port: int) -> None:
    url = f"http://cdn.test:{http_port}/{name}"
    async with asyncio.timeout(AMPLE_SECONDS):
        causes = await asyncio.gather(*(cause_of_failure(url, 0.5) for _ in range(AT_ONCE)))
    assert all(cause.startswith(TOO_LATE) for cause in causes), causes


async def test_a_slow_tls_handshake_ends_its_download_at_the_time_limit(http_port: int) -> None:
    async def greet_slowly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for byte in b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc" * 1000:  # a large ServerHello
                writer.write(bytes([byte]))
                await asyncio.sleep(0.01)
        finally:
            writer.close()

    server = await asyncio.start_server(greet_slowly, "127.0.0.1", 0)
    async with server, asyncio.timeout(AMPLE_SECONDS):
        port = server.sockets[0].getsockname()[1]
        assert (await cause_of_failure(f"https://cdn.test:{port}/", 0.5)).startswith(TOO_LATE)


@pytest.mark.parametrize(
    ("name", "tickets"),
    [
        ("continue", 2),
        ("chunks-of-1-byte", 2),
        ("tls-records-of-1-byte", 2),
        ("after-session-tickets", 20_000),
    ],
)
async def test_bytes_below_http_count_too(name: str, tickets: int, authority: Path) -> None:
    with hostile_server(str(authority), str(tickets)) as port:
        async with measured_turns() as turns:
            url = f"https://cdn.test:{port}/{name}"
            causes = await asyncio.gather(*(cause_of_failure(url) for _ in range(AT_ONCE)))
    assert causes == [OVERHEAD] * AT_ONCE
    assert turns.longest_cpu_seconds < TURN_CPU_SECONDS


@pytest.mark.parametrize("name", BEFORE_THE_HEADERS)
async def test_an_attempt_at_a_webhook_is_bounded(name: str, http_port: int) -> None:
    post = webhook_sender(CDN, resolver=NAMES, timeout_seconds=AMPLE_SECONDS)
    async with measured_turns() as turns:
        url = f"http://cdn.test:{http_port}/{name}"
        outcomes = await asyncio.gather(*(post(url, b"{}", {}) for _ in range(AT_ONCE)))
    assert [outcome.reason for outcome in outcomes] == [OVERHEAD] * AT_ONCE
    assert turns.longest_cpu_seconds < TURN_CPU_SECONDS


@pytest.mark.parametrize("name", BEFORE_THE_HEADERS)
async def test_an_upload_to_the_storage_of_a_tenant_is_bounded(name: str, http_port: int) -> None:
    store = TenantS3(OutboundPolicy.parse("127.0.0.0/8"))
    details = StorageDetails(
        public_url="https://files.example/",
        region_name="eu-west-1",
        endpoint_url=f"http://127.0.0.1:{http_port}",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        image_directory=name,
    )

    async def put() -> None:
        with pytest.raises(StorageError):
            await store.put(details, "a.png", b"image", "image/png")

    async with measured_turns() as turns:
        await asyncio.gather(*(put() for _ in range(AT_ONCE)))
    assert turns.longest_cpu_seconds < TURN_CPU_SECONDS


async def test_large_content_in_ordinary_chunks_is_not_overhead() -> None:
    content, size = bytes(2**22), 1024
    assert len(content) > 8 * OVERHEAD_BYTES
    chunk = f"{size:x}\r\n".encode() + content[:size] + b"\r\n"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    chunked += chunk * (len(content) // size) + b"0\r\n\r\n"
    for sent in (chunked, answer(200, content)):
        async with origin(sent) as server:
            assert await fetch(f"http://cdn.test:{server.port}/", CDN, NAMES) == content
