"""A role with its NATS server: valid credentials, and errors that name the setting."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from benchmarks.local_stack import free_port
from img2img_server.devstack.nats import nats_server
from img2img_server.domain.params import Lane
from img2img_server.errors import MessageTooLargeError, UnavailableError
from img2img_server.interfaces.queue import QueuedJob
from img2img_server.lifecycle import StoppedError
from img2img_server.nats.bus import connect_bus
from img2img_server.nats.connection import connect
from img2img_server.settings import Settings, SettingsError
from tests.nats_servers import NatsServer, certificates, nats_configured
from tests.stack import read_until, running_api, running_worker, spec

PASSWORD = "p@ss:w/rd#?%41"
LONG = 120.0  # seconds; a timeout that no passing test reaches


def with_user(password: str) -> str:
    login = f'user: "u2", password: {json.dumps(password)}'
    return f"max_payload: 8MB\nauthorization {{ {login} }}"


async def refused(url: str, kind: type[Exception] = SettingsError, **more: Any) -> str:
    """Returns the error of a role with these settings when it connects to NATS."""
    more.setdefault("startup_timeout_seconds", 0.5 if kind is UnavailableError else LONG)
    async with asyncio.timeout(LONG / 2):
        with pytest.raises(kind) as caught:
            async with connect_bus(Settings(nats_url=url, **more)):
                pass
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


async def test_a_password_with_any_characters_opens_the_bus(tmp_path: Path) -> None:
    async with nats_configured(tmp_path, with_user(PASSWORD)) as nats:
        encoded = quote(PASSWORD, safe="")
        for settings in (
            Settings(nats_url=f"nats://u2:{encoded}@{nats.address}"),
            Settings(nats_url=f"nats://{nats.address}", nats_user="u2", nats_password=PASSWORD),
        ):
            async with connect_bus(settings) as bus:
                assert await bus.workers.workers() == []


async def test_a_token_opens_the_bus(tmp_path: Path) -> None:
    config = f"max_payload: 8MB\nauthorization {{ token: {json.dumps(PASSWORD)} }}"
    async with nats_configured(tmp_path, config) as nats:
        encoded = quote(PASSWORD, safe="")
        for settings in (
            Settings(nats_url=f"nats://{encoded}@{nats.address}"),
            Settings(nats_url=f"nats://{nats.address}", nats_token=PASSWORD),
        ):
            async with connect_bus(settings) as bus:
                assert await bus.workers.workers() == []


async def test_a_wrong_password_ends_the_start_at_once_and_names_the_setting(
    tmp_path: Path,
) -> None:
    async with nats_configured(tmp_path, with_user("right")) as nats:
        said = f"the NATS server at {nats.address} refused the user (Authorization Violation)"
        encoded = quote(PASSWORD, safe="")
        url = f"nats://u2:{encoded}@{nats.address}"
        assert await refused(url) == f"IMG2IMG_NATS_URL: {said}"
        assert await refused(f"nats://{nats.address}") == f"IMG2IMG_NATS_URL: {said}"
        given = {"nats_user": "u2", "nats_password": PASSWORD}
        assert await refused(nats.address, **given) == f"IMG2IMG_NATS_PASSWORD: {said}"
        assert await refused(nats.address, nats_token="t") == f"IMG2IMG_NATS_TOKEN: {said}"


async def test_a_server_that_lets_us_in_is_enough(tmp_path: Path) -> None:
    async with (
        nats_configured(tmp_path / "a", with_user("right")) as right,
        nats_configured(tmp_path / "b", with_user("other")) as wrong,
    ):
        url = f"nats://u2:right@{wrong.address},nats://u2:right@{right.address}"
        async with connect_bus(Settings(nats_url=url)) as bus:
            assert await bus.workers.workers() == []


async def test_what_cannot_be_reached_is_reported_apart() -> None:
    port = free_port()
    said = await refused(f"nats://u:p@127.0.0.1:{port}", UnavailableError)
    assert f"IMG2IMG_NATS_URL: nothing listens at 127.0.0.1:{port}" in said
    said = await refused("nats://no-such-host.invalid:4222", UnavailableError)
    assert "the name no-such-host.invalid cannot be resolved" in said


@asynccontextmanager
async def answering(greeting: bytes) -> AsyncIterator[str]:
    """Yields the address of a server that is no NATS server."""

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"INFO no json\r\n",
        b"x" * 200_000,
        b"\xff\xfe\r\n",
    ],
)
async def test_what_is_no_nats_server_is_called_so(greeting: bytes) -> None:
    async with answering(greeting) as address:
        said = await refused(f"nats://{address}", UnavailableError)
    assert f"{address} is no NATS server" in said


async def test_a_start_that_waits_for_nats_says_why_and_goes_on_when_it_is_there(
    tmp_path: Path,
) -> None:
    async with nats_configured(tmp_path) as nats:
        pass
    waiting = asyncio.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "nothing listens at" in record.getMessage():
                waiting.set()

    logging.getLogger("img2img_server").addHandler(handler := Handler())
    try:
        settings = Settings(nats_url=f"nats://{nats.address}")

        async def use() -> None:
            async with connect_bus(settings) as bus:
                assert await bus.workers.workers() == []

        using = asyncio.create_task(use())
        async with asyncio.timeout(LONG):
            await waiting.wait()
            await nats.child.start()
            await using
    finally:
        logging.getLogger("img2img_server").removeHandler(handler)
        await nats.child.stop()


async def test_a_stop_ends_the_wait_for_nats_at_once() -> None:
    stop = asyncio.Event()

    async def start() -> None:
        async with connect_bus(Settings(nats_url=f"nats://127.0.0.1:{free_port()}"), stop=stop):
            pass

    starting = asyncio.create_task(start())
    asyncio.get_running_loop().call_later(0.05, stop.set)
    async with asyncio.timeout(10):
        with pytest.raises(StoppedError):
            await starting


async def test_a_server_without_jetstream_is_refused(tmp_path: Path) -> None:
    async with nats_configured(tmp_path, jetstream=False) as nats:
        said = await refused(f"nats://{nats.address}")
    assert said.startswith(f"IMG2IMG_NATS_URL: the NATS server at {nats.address}")
    assert "JetStream is not enabled" in said


async def test_an_account_without_jetstream_is_refused(tmp_path: Path) -> None:
    config = (
        "max_payload: 8MB\naccounts { plain { users: [{user: u, password: p}] }, "
        "rich { jetstream: enabled, users: [{user: r, password: p}] } }"
    )
    async with nats_configured(tmp_path, config) as nats:
        said = await refused(f"nats://u:p@{nats.address}")
    assert "jetstream not enabled for account" in said.lower()


async def test_a_user_without_permissions_is_reported_which_one_is_missing(tmp_path: Path) -> None:
    permissions = 'permissions: { publish: "elsewhere.>", subscribe: ">" }'
    user = f'{{ user: "u2", password: "right", {permissions} }}'
    config = f"max_payload: 8MB\nauthorization {{ users: [{user}] }}"
    async with nats_configured(tmp_path, config) as nats:
        said = await refused(f"nats://u2:right@{nats.address}")
    assert said.startswith(
        "IMG2IMG_NATS_URL: the NATS server denies the user a permission that it needs"
    )
    assert "$js.api.stream.create" in said.lower()


async def test_more_replicas_than_servers_name_the_setting(tmp_path: Path) -> None:
    async with nats_configured(tmp_path) as nats:
        said = await refused(f"nats://{nats.address}", nats_replicas=3)
    assert said.startswith("IMG2IMG_NATS_REPLICAS: ")


async def test_a_server_with_the_default_max_payload_is_refused_at_the_start(
    tmp_path: Path,
) -> None:
    async with nats_configured(tmp_path, "") as nats:
        said = await refused(f"nats://{nats.address}")
    assert "at most 1048576 bytes (max_payload), and images need 7208960" in said
    assert "max_payload: 8MB" in said
    assert "IMG2IMG_MAX_SIDE_PIXELS" in said


@pytest.mark.parametrize(
    ("side", "enough"), [(1024, "3500000"), (1536, "8MB"), (2048, "13MB"), (3328, "34MB")]
)
async def test_max_payload_is_enough_for_the_largest_image(
    tmp_path: Path, side: int, enough: str
) -> None:
    async with nats_configured(tmp_path, f"max_payload: {enough}") as nats:
        url = f"nats://{nats.address}"
        async with connect_bus(Settings(nats_url=url, max_side_pixels=side)) as bus:
            image = np.random.default_rng(0).bytes(3 * side**2)
            job = QueuedJob(job_id=1, tenant="t", init_image=image)
            assert await bus.queue.put(job, "m", Lane.BATCH)
        said = await refused(url, max_side_pixels=side + side // 4) if side < 3200 else ""
    assert side >= 3200 or "(max_payload), and images need" in said


async def test_a_message_that_no_stream_takes_is_too_large(tmp_path: Path) -> None:
    async with nats_configured(tmp_path, "max_payload: 51MB") as nats:
        url = f"nats://{nats.address}"
        async with connect_bus(Settings(nats_url=url, max_side_pixels=4096)) as bus:
            job = QueuedJob(job_id=1, tenant="t", init_image=bytes(2**25))
            with pytest.raises(MessageTooLargeError):
                await bus.queue.put(job, "m", Lane.BATCH)


def test_the_nats_of_local_takes_the_largest_image(tmp_path: Path) -> None:
    nats_server(tmp_path, 4222, "p", payload_bytes=51_000_000)
    assert "max_payload: 51000000\n" in (tmp_path / "nats.conf").read_text()
    nats_server(tmp_path, 4222, "p")
    assert "max_payload: 8388608\n" in (tmp_path / "nats.conf").read_text()


async def test_a_message_beyond_max_payload_is_an_error_of_the_service(tmp_path: Path) -> None:
    async with nats_configured(tmp_path, "") as nats, connect([nats.address]) as link:
        with pytest.raises(MessageTooLargeError, match="max_payload"):
            await link.publish("img2img.jobs.x", bytes(2**20 + 1))
        with pytest.raises(MessageTooLargeError):
            await link.send("img2img.jobs.x", bytes(2**20 + 1))


async def test_tls_with_an_own_authority_and_a_client_certificate(tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls")
    config = f"max_payload: 8MB\ntls {{ {files}, verify: true }}"
    ours = {
        "nats_ca_file": tmp_path / "tls" / "ca.pem",
        "nats_cert_file": tmp_path / "tls" / "client.pem",
        "nats_key_file": tmp_path / "tls" / "client.key",
    }
    async with nats_configured(tmp_path / "nats", config) as nats:
        async with connect_bus(Settings(nats_url=f"nats://{nats.address}", **ours)) as bus:
            assert await bus.workers.workers() == []
        said = await refused(f"tls://{nats.address}")
        assert said.startswith("IMG2IMG_NATS_CA_FILE: ")
        assert "is not trusted" in said
        said = await refused(f"nats://{nats.address}")  # The server requires TLS.
        assert said.startswith("IMG2IMG_NATS_CA_FILE: ")
        said = await refused(f"tls://{nats.address}", nats_ca_file=ours["nats_ca_file"])
        assert "certificate" in said


async def test_tls_is_not_given_up_for_a_server_without_it(tmp_path: Path) -> None:
    async with nats_configured(tmp_path, with_user("right")) as nats:
        said = await refused(f"tls://u2:right@{nats.address}")
    assert "does not offer TLS" in said


async def until(condition: Any) -> None:
    async with asyncio.timeout(LONG):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_user_that_is_refused_while_running_is_let_in_again_later(tmp_path: Path) -> None:
    """A changed password closes the connection, which nats-py alone would never open again."""

    def change(nats: NatsServer, password: str) -> None:
        nats.configure(with_user(password))
        nats.reload()

    async with nats_configured(tmp_path, with_user("right")) as nats:
        settings = Settings(nats_url=f"nats://u2:right@{nats.address}")
        async with connect_bus(settings, reconnect_wait_seconds=LONG) as bus:
            assert bus.trouble() == ""
            change(nats, "other")
            await until(lambda: "refused the user" in bus.trouble())
            change(nats, "right")
            await until(lambda: not bus.trouble())
            assert await bus.workers.workers() == []


async def test_the_permissions_that_the_documentation_names_are_enough(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    (said,) = re.findall(
        r"allowed to publish to (.*?), and\s+to subscribe to (.*?)\. A m", page, re.S
    )
    publish, subscribe = (re.findall(r"`([^`]+)`", subjects) for subjects in said)
    permissions = json.dumps({"publish": publish, "subscribe": subscribe})
    user = f'{{ user: "u2", password: "right", permissions: {permissions} }}'
    async with nats_configured(
        tmp_path, f"max_payload: 8MB\nauthorization {{ users: [{user}] }}"
    ) as nats:
        settings = Settings(nats_url=f"nats://u2:right@{nats.address}")
        async with connect_bus(settings) as bus, running_worker(bus), running_api(bus) as api:
            created = await api.create(spec())
            await read_until(api.watch(created.name), "succeeded")
    assert not [line for line in caplog.messages if "permission" in line]


async def test_a_server_that_the_cluster_reported_about_gets_the_credentials_too(
    tmp_path: Path,
) -> None:
    """nats-py takes credentials from the address, and addresses from the cluster have none."""
    routes = [free_port(), free_port()]

    def member(number: int) -> str:
        route = f"nats://r:r@127.0.0.1:{routes[1 - number]}"
        return (
            f'{with_user(PASSWORD)}\ncluster {{ name: c, listen: "127.0.0.1:{routes[number]}", '
            f'routes: ["{route}"], authorization {{ user: r, password: r }} }}'
        )

    async with (
        nats_configured(tmp_path / "a", member(0), jetstream=False) as first,
        nats_configured(tmp_path / "b", member(1), jetstream=False) as second,
    ):
        url = f"nats://u2:{quote(PASSWORD, safe='')}@{first.address}"
        async with connect([url], reconnect_wait_seconds=LONG) as link:
            await until(lambda: len(link.nc.servers) > 1 or link.nc.discovered_servers)
            await first.child.stop()
            await until(lambda: link.nc.attempted == second.address and link.nc.is_connected)
            await link.send("img2img.x", b"x")


@pytest.mark.filterwarnings("ignore:parameter 'timeout' of type 'float':DeprecationWarning")
async def test_a_websocket_with_tls_needs_no_second_one(tmp_path: Path) -> None:
    """Behind an ingress, TLS ends before NATS, and the server's INFO does not mention it."""
    await asyncio.to_thread(certificates, tmp_path / "tls")
    port, front = free_port(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    front.load_cert_chain(tmp_path / "tls" / "server.pem", tmp_path / "tls" / "server.key")
    config = f'max_payload: 8MB\nwebsocket {{ listen: "127.0.0.1:{port}", no_tls: true }}'

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
            target.close()

        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    async with (
        nats_configured(tmp_path / "nats", config),
        await asyncio.start_server(relay, "127.0.0.1", 0, ssl=front) as server,
    ):
        url = f"wss://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        settings = Settings(nats_url=url, nats_ca_file=tmp_path / "tls" / "ca.pem")
        async with connect_bus(settings) as bus:
            assert await bus.workers.workers() == []


@pytest.mark.filterwarnings("ignore:parameter 'timeout' of type 'float':DeprecationWarning")
async def test_nats_by_websocket_takes_credentials_and_says_why_not(tmp_path: Path) -> None:
    port = free_port()
    config = f'{with_user(PASSWORD)}\nwebsocket {{ listen: "127.0.0.1:{port}", no_tls: true }}'
    async with nats_configured(tmp_path, config):
        given = {"nats_user": "u2", "nats_password": PASSWORD}
        async with connect_bus(Settings(nats_url=f"ws://127.0.0.1:{port}", **given)) as bus:
            assert await bus.workers.workers() == []
        said = await refused(f"ws://u2:wrong@127.0.0.1:{port}")
        assert "refused the user" in said
    said = await refused(f"ws://127.0.0.1:{port}", UnavailableError)
    assert f"127.0.0.1:{port} cannot be reached" in said
