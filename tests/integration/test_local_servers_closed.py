"""Without credentials, no port of the local servers serves anything: not to other users of the
machine, not to web pages, and not to webhooks.
"""

from __future__ import annotations

import asyncio
import ssl
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

from img2img_server.devstack import LocalServers
from img2img_server.devstack.certificate import new_certificate
from img2img_server.devstack.weed import PORTS
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.ports import free_ports
from img2img_server.settings import Settings
from img2img_server.storage.interface import BlobStore
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.webhooks.sender import webhook_sender

HOST = "127.0.0.1"
BUCKET = "img2img"
KEY = "generations/5f0c-0.png"
IMAGE = b"the image of a tenant"
INSIDE = tuple(part for part in PORTS if part != "s3")
WEB = tuple(part for part in INSIDE if not part.endswith(".grpc"))
# A page of another site, or of a name that an attacker rebound to this machine.
FOREIGN = "Host: attacker.example\r\nOrigin: https://attacker.example\r\n"
DELETE = f"/col/delete?collection={BUCKET}"
PATHS = (
    "/",
    "/status",
    "/metrics",
    "/dir/status",
    "/dir/assign",
    "/cluster/status",
    "/vol/grow?count=1",
    "/ui/index.html",
    f"/buckets/{BUCKET}/generations/",
    f"/buckets/{BUCKET}/{KEY}",
    f"/{BUCKET}/{KEY}",
    DELETE,
)
NO_TLS = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server."


def trusting(folder: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(folder / "tls.crt"))


def with_the_key(folder: Path, owner: Path | None = None) -> ssl.SSLContext:
    """Returns a context that presents the certificate in a folder, by default the right one."""
    context = trusting(folder)
    context.load_cert_chain((owner or folder) / "tls.crt", (owner or folder) / "tls.key")
    return context


async def response_of(port: int, request: str, tls: ssl.SSLContext | None = None) -> bytes:
    """Returns everything that a port sends; nothing if it only closes the connection."""
    try:
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_connection(HOST, port, ssl=tls)
            try:
                writer.write(request.encode())
                return await reader.read()
            finally:
                writer.transport.abort()
    except (OSError, ssl.SSLError):
        return b""


def sockets(engines: LocalServers) -> list[Path]:
    """Returns the sockets of weed, which are in /tmp."""
    return [
        path for port in engines._ports.values() for path in Path("/tmp").glob(f"*-{port}.sock")
    ]


def asked(path: str, method: str = "GET") -> str:
    return f"{method} {path} HTTP/1.1\r\n{FOREIGN}Content-Length: 0\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def one_image(engines: LocalServers) -> AsyncIterator[BlobStore]:
    """Stores an image."""
    settings = Settings(
        nats_url=engines.nats_url,
        s3_endpoint_url=engines.s3_endpoint_url,
        s3_access_key=engines.s3_access_key,
        s3_secret_key=engines.s3_secret_key,
        s3_bucket=BUCKET,
    )
    async with connect_blobs(settings) as blobs:
        await blobs.prepare()
        await blobs.put(KEY, IMAGE, "image/png")
        yield blobs


async def content(blobs: BlobStore) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(KEY)])


async def listening(engines: LocalServers) -> None:
    """Waits for the ports that open after the servers are ready."""
    async with asyncio.timeout(30):
        for port in engines._ports.values():
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection(HOST, port)
                    writer.close()
                    break
                await asyncio.sleep(0.05)


async def test_no_port_serves_a_request_without_credentials(engines: LocalServers) -> None:
    async with one_image(engines) as blobs:
        await listening(engines)
        ports, tls = engines._ports, trusting(engines._folder)
        for path in PATHS:
            for request in (asked(path), asked(path, "POST")):
                for part in INSIDE:
                    sent = await response_of(ports[part], request)
                    assert sent.strip() in (b"", NO_TLS), (part, request, sent)
                    assert await response_of(ports[part], request, tls) == b"", (part, request)
                refused = (await response_of(ports["s3"], request)).split(b"\r\n")
                is_empty = b"Content-Length: 0" in refused  # of /status and of other methods
                assert is_empty or refused[0] == b"HTTP/1.1 403 Forbidden" or b"405" in refused[0]
        assert b"-ERR" in await response_of(ports["nats"], asked("/"))
        assert b"PONG" not in await response_of(ports["nats"], "CONNECT {}\r\nPING\r\n")
        assert await content(blobs) == IMAGE


async def test_the_parts_of_weed_serve_the_owner_of_the_key(engines: LocalServers) -> None:
    async with one_image(engines):
        tls = with_the_key(engines._folder)
        await listening(engines)
        found = {part: await response_of(engines._ports[part], asked("/"), tls) for part in WEB}
        assert all(sent.startswith(b"HTTP/1.1 ") for sent in found.values()), found
        status = await response_of(engines._ports["master"], asked("/dir/status"), tls)
        assert b"HTTP/1.1 200 OK" in status


async def test_another_certificate_is_refused(engines: LocalServers, tmp_path: Path) -> None:
    await listening(engines)
    new_certificate(tmp_path, HOST)
    tls = with_the_key(engines._folder, tmp_path)
    for part in INSIDE:
        assert await response_of(engines._ports[part], asked("/"), tls) == b"", part


async def test_a_webhook_that_may_go_to_loopback_deletes_nothing(engines: LocalServers) -> None:
    async with one_image(engines) as blobs:
        post = webhook_sender(OutboundPolicy.parse("127.0.0.0/8"))
        for part in PORTS:
            for path in (DELETE, "/dir/status"):
                url = f"http://{HOST}:{engines._ports[part]}{path}"
                assert not (await post(url, b"{}", {})).delivered, url
        assert await content(blobs) == IMAGE


def modes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}


async def test_other_users_may_not_read_their_files_and_sockets(state_dir: Path) -> None:
    folder = state_dir / "engines"
    folder.mkdir(parents=True)
    folder.chmod(0o755)  # An earlier version may have made the folder.
    async with LocalServers(state_dir) as engines:
        await listening(engines)
        assert modes([folder]) == {"engines": "0o700"}
        secrets = ("tls.key", "s3.json", "nats.conf", "nats.password")
        assert set(modes(folder / name for name in secrets).values()) == {"0o600"}
        opened = modes(sockets(engines))
    assert len(opened) == 7
    assert set(opened.values()) == {"0o700"}


async def test_sockets_that_a_killed_server_left_are_removed(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = free_ports(1 + len(PORTS))
    monkeypatch.setattr("img2img_server.devstack.servers.free_ports", lambda _: ports)
    left = Path("/tmp") / f"seaweedfs-left-{ports[1]}.sock"
    left.touch()
    async with LocalServers(state_dir):
        assert not left.exists()


async def test_they_listen_on_known_ports_of_loopback_only(engines: LocalServers) -> None:
    await listening(engines)
    found = {
        connection.laddr
        for child in engines._children
        for connection in psutil.Process(child.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert found == {(HOST, port) for port in engines._ports.values()}
