"""The causes that the client reports when a connection fails."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from click.testing import CliRunner

from img2img_client import AsyncClient, Cause, Client, InvalidArgumentError, Retry, UnavailableError
from img2img_client.channel import Endpoint
from img2img_client.cli import main as cli
from img2img_client.diagnosis import probe
from tests.fake_service import FakeService, serving
from tests.golden_file import assert_golden

AUTHORITY, STRANGER = trustme.CA(), trustme.CA()
ROOT = AUTHORITY.cert_pem.bytes()
RETRY = Retry(connect_seconds=0.05, first_delay_seconds=0.01)


@contextmanager
def tls_server(
    *names: str, not_after: datetime.datetime | None = None, asks_for_ours: bool = False
) -> Iterator[int]:
    issued = AUTHORITY.issue_cert(*names, not_after=not_after)
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    credentials = grpc.ssl_server_credentials(
        [pair], ROOT if asks_for_ours else None, asks_for_ours
    )
    with serving(FakeService(), credentials=credentials) as port:
        yield port


@contextmanager
def plain_server(answer: bytes, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Yields a TCP server that sends `answer` after the first bytes of each connection and closes
    it. `tls`: it accepts TLS handshakes.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_all() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    if tls and connection.recv(1, socket.MSG_PEEK) == b"\x16":
                        with suppress(OSError), tls.wrap_socket(connection, server_side=True):
                            continue
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=answer_all)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def failure(server: str, *, tls: bool = False, root: bytes | None = None) -> UnavailableError:
    """Returns the error of a call."""
    with (
        Client(server, api_key="k", tls=tls, root_certificates=root, retry=RETRY) as client,
        pytest.raises(UnavailableError) as caught,
    ):
        client.capabilities()
    error = caught.value
    assert str(error).startswith(f"cannot reach the service at {client.endpoint.target}: ")
    assert (error.code, error.reason) == ("UNAVAILABLE", "TRANSPORT")
    return error


@contextmanager
def web_server_with_tls(page: bytes) -> Iterator[int]:
    """Yields a server with TLS, like a proxy in front of the service. It responds to plaintext with
    `page`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    with plain_server(page, context) as port:
        yield port


@contextmanager
def closed_port() -> Iterator[int]:
    with serving(FakeService()) as port:
        pass
    yield port


WEB_PAGE = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
LONG_AGO = datetime.datetime(2020, 1, 1)
# A server, the client's options, and the cause that the client reports.
SERVERS: dict[str, tuple[Callable[[], AbstractContextManager[int]], dict[str, Any], Cause]] = {
    "plain server, TLS client": (lambda: serving(FakeService()), {"tls": True}, Cause.NO_TLS),
    "TLS server, plain client": (lambda: tls_server("localhost"), {}, Cause.TLS_EXPECTED),
    "web server with TLS that answers": (
        lambda: web_server_with_tls(WEB_PAGE),
        {},
        Cause.TLS_EXPECTED,
    ),
    "web server with TLS that closes": (lambda: web_server_with_tls(b""), {}, Cause.TLS_EXPECTED),
    "authority that the system does not trust": (
        lambda: tls_server("127.0.0.1"),
        {"tls": True},
        Cause.CERTIFICATE_REJECTED,
    ),
    "authority that is not among the roots": (
        lambda: tls_server("127.0.0.1"),
        {"root": STRANGER.cert_pem.bytes()},
        Cause.CERTIFICATE_REJECTED,
    ),
    "certificate for another name": (
        lambda: tls_server("img2img.example.com"),
        {"root": ROOT},
        Cause.CERTIFICATE_REJECTED,
    ),
    "expired certificate": (
        lambda: tls_server("127.0.0.1", not_after=LONG_AGO),
        {"root": ROOT},
        Cause.CERTIFICATE_REJECTED,
    ),
    "server that requires a client certificate": (
        lambda: tls_server("127.0.0.1", asks_for_ours=True),
        {"root": ROOT},
        Cause.TLS_FAILED,
    ),
    "web server, plain client": (lambda: plain_server(WEB_PAGE), {}, Cause.NOT_GRPC),
    "web server, TLS client": (lambda: plain_server(WEB_PAGE), {"tls": True}, Cause.NO_TLS),
    "NATS server": (
        lambda: plain_server(b'INFO {"server_id":"N1"}\r\n'),
        {},
        Cause.NOT_GRPC,
    ),
    "server that closes": (lambda: plain_server(b""), {}, Cause.NOT_GRPC),
    "closed port, plain client": (closed_port, {}, Cause.REFUSED),
    "closed port, TLS client": (closed_port, {"tls": True}, Cause.REFUSED),
}


def test_the_cause_is_reported_and_its_message_is_in_the_golden_file() -> None:
    causes, lines = {}, []
    for name, (server, how, _) in SERVERS.items():
        with server() as port:
            error = failure(f"127.0.0.1:{port}", **how)
        causes[name] = error.metadata["cause"]
        lines.append(f"{name}: {error}\n".replace(str(port), "PORT"))
    assert causes == {name: cause for name, (_, _, cause) in SERVERS.items()}
    assert_golden("client/connection_failures.txt", "".join(lines))


@pytest.mark.parametrize("server", ["img2img.invalid:50051", "dns:///img2img.invalid:50051"])
def test_a_host_that_does_not_exist(server: str) -> None:
    error = failure(server)
    assert error.metadata["cause"] == Cause.HOST_NOT_FOUND


def test_an_address_that_refuses_does_not_hide_the_one_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On many machines localhost resolves to ::1 first, where nothing listens."""
    real = socket.getaddrinfo

    def both(host: str, *given: object, **named: object) -> list[object]:
        ips = ["127.9.9.9", "127.0.0.1"] if host == "localhost" else [host]
        return [one for ip in ips for one in real(ip, *given, **named)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with tls_server("localhost") as port:
        finding = probe(Endpoint(f"localhost:{port}"))
    assert finding.cause is Cause.TLS_EXPECTED


def test_a_server_that_does_not_respond_delays_the_error_only_briefly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for tls in (False, True):
            began = time.monotonic()
            finding = probe(Endpoint(f"127.0.0.1:{silent.getsockname()[1]}", tls=tls), 0.2)
            assert time.monotonic() - began < 5.0
            assert finding.cause is Cause.NO_ANSWER


def test_a_resolver_that_hangs_delays_the_error_only_briefly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30))
    began = time.monotonic()
    finding = probe(Endpoint("img2img.example.com"), 0.1)
    release.set()
    assert time.monotonic() - began < 5.0
    assert finding.cause is Cause.HOST_NOT_FOUND


def test_a_connection_error_names_the_proxy_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeService()) as port:
        pass
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "intranet.example.com")
    error = failure("img2img.example.com:443")
    assert "https_proxy" in str(error)


def test_the_async_client_reports_the_same_cause() -> None:
    async def main(port: int) -> str:
        async with AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=RETRY) as client:
            with pytest.raises(UnavailableError) as caught:
                await client.capabilities()
            with pytest.raises(UnavailableError) as streamed:
                await client.watch(1).result()
            assert str(streamed.value) == str(caught.value)
            return caught.value.metadata["cause"]

    with tls_server("localhost") as port:
        assert asyncio.run(main(port)) == Cause.TLS_EXPECTED


def test_invalid_certificates_are_rejected_before_any_call() -> None:
    for junk in (b"# img2img\n", b"", AUTHORITY.private_key_pem.bytes(), b"\x30\x82\x01\x0a"):
        with pytest.raises(InvalidArgumentError) as caught:
            Client("127.0.0.1:1", root_certificates=junk)
        assert caught.value.violations[0].field == "root_certificates"


def pair_of(authority: trustme.CA) -> tuple[bytes, bytes]:
    issued = authority.issue_cert("client.example")
    return issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes()


def test_a_client_shows_its_certificate_to_a_server_that_requires_one(tmp_path: Path) -> None:
    def call(pair: tuple[bytes, bytes]) -> str:
        with Client(
            f"127.0.0.1:{port}",
            api_key="k",
            root_certificates=ROOT,
            client_certificate=pair,
            retry=RETRY,
        ) as client:
            return client.capabilities().server_version

    with tls_server("127.0.0.1", asks_for_ours=True) as port:
        chain, key = pair_of(AUTHORITY)
        assert call((chain, key)) == "0.1.0"
        with pytest.raises(UnavailableError, match="does it trust client_certificate"):
            call(pair_of(STRANGER))
        files = {"ca-file": ROOT, "cert-file": chain, "key-file": key}
        words = ["capabilities", "--server", f"127.0.0.1:{port}", "--json"]
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
            words += [f"--{name}", str(tmp_path / name)]
        ran = CliRunner().invoke(cli, words)
        assert ran.exit_code == 0, ran.output
        alone = CliRunner().invoke(cli, words[:-2])
        assert "--cert-file and --key-file must be given together" in alone.output


def test_a_wrong_client_certificate_is_rejected_before_any_call() -> None:
    chain, key = pair_of(AUTHORITY)
    other, _ = pair_of(STRANGER)
    for pair, fault in (
        ((chain, pair_of(AUTHORITY)[1]), "the key is not that of the certificate"),
        ((other, key), "the key is not that of the certificate"),
        ((chain, b""), "must be a certificate and its key"),
        ((b"junk", key), "must be a certificate and its key"),
        (chain, "two PEM files"),
        ((chain, key, key), "two PEM files"),
    ):
        with pytest.raises(InvalidArgumentError, match=fault) as caught:
            Client("127.0.0.1:1", root_certificates=ROOT, client_certificate=pair)  # type: ignore[arg-type]
        assert caught.value.violations[0].field == "client_certificate"
        assert "PRIVATE KEY" not in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="without TLS"):
        Client("127.0.0.1:1", client_certificate=(chain, key))


def test_tls_trusts_the_authorities_of_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(ROOT)
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    with (
        tls_server("127.0.0.1") as port,
        Client(f"127.0.0.1:{port}", api_key="k", tls=True) as client,
    ):
        assert client.capabilities().server_version == "0.1.0"
