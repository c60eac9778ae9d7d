"""What the client says when a connection cannot be made: the cause, and what to do about it."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
import trustme

from img2img_client import AsyncClient, Cause, Client, Retry, UnavailableError
from img2img_client.channel import Endpoint
from img2img_client.diagnosis import probe
from tests.fake_service import FakeService, serving

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
    """A TCP server that answers every connection's first bytes with `answer`, then closes.

    `tls`: it takes those that begin with a TLS handshake.
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
    """The error of a call."""
    with (
        Client(server, api_key="k", tls=tls, root_certificates=root, retry=RETRY) as client,
        pytest.raises(UnavailableError) as caught,
    ):
        client.capabilities()
    error = caught.value
    assert str(error).startswith(f"cannot reach the service at {client.endpoint.target}: ")
    assert (error.code, error.reason) == ("UNAVAILABLE", "TRANSPORT")
    return error


def test_tls_to_a_server_without_it() -> None:
    with serving(FakeService()) as port:
        error = failure(f"127.0.0.1:{port}", tls=True)
    assert error.metadata["cause"] == Cause.NO_TLS
    assert "the server does not speak TLS: leave out tls" in str(error)


def test_no_tls_to_a_server_that_wants_it() -> None:
    with tls_server("localhost") as port:
        error = failure(f"127.0.0.1:{port}")
    assert error.metadata["cause"] == Cause.TLS_EXPECTED
    assert "the server seems to expect TLS: use tls=True" in str(error)


@pytest.mark.parametrize("page", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_no_tls_to_a_web_server_with_tls(page: bytes) -> None:
    """As proxies do that stand before the service."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1").configure_cert(context)
    with plain_server(page, context) as port:
        error = failure(f"127.0.0.1:{port}")
    assert error.metadata["cause"] == Cause.TLS_EXPECTED


@pytest.mark.parametrize("root", [None, STRANGER.cert_pem.bytes()], ids=["system", "stranger"])
def test_a_certificate_of_an_unknown_authority(root: bytes | None) -> None:
    with tls_server("127.0.0.1") as port:
        error = failure(f"127.0.0.1:{port}", tls=True, root=root)
    assert error.metadata["cause"] == Cause.CERTIFICATE_REJECTED
    assert "the certificate of 127.0.0.1 is not trusted: unable to get local issuer" in str(error)
    assert "pass the certificate of its authority as root_certificates (--ca-file)" in str(error)


def test_a_certificate_for_another_name() -> None:
    with tls_server("img2img.example.com") as port:
        error = failure(f"127.0.0.1:{port}", root=ROOT)
    assert error.metadata["cause"] == Cause.CERTIFICATE_REJECTED
    assert "the certificate of 127.0.0.1 is for another name" in str(error)


def test_a_certificate_that_has_expired() -> None:
    with tls_server("127.0.0.1", not_after=datetime.datetime(2020, 1, 1)) as port:
        error = failure(f"127.0.0.1:{port}", root=ROOT)
    assert error.metadata["cause"] == Cause.CERTIFICATE_REJECTED
    assert "is not trusted: certificate has expired; the server needs a new one" in str(error)


def test_a_server_that_asks_for_a_certificate_of_the_client() -> None:
    with tls_server("127.0.0.1", asks_for_ours=True) as port:
        error = failure(f"127.0.0.1:{port}", root=ROOT)
    assert error.metadata["cause"] == Cause.TLS_FAILED
    assert "does it ask for a certificate of yours?" in str(error)


@pytest.mark.parametrize("tls", [False, True])
def test_the_port_of_a_web_server(tls: bool) -> None:
    with plain_server(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as port:
        error = failure(f"127.0.0.1:{port}", tls=tls)
    cause, text = (
        (Cause.NO_TLS, "does not speak TLS")
        if tls
        else (Cause.NOT_GRPC, "it answers in HTTP/1, not in gRPC: is this the port of the HTTP")
    )
    assert error.metadata["cause"] == cause
    assert text in str(error)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            b'INFO {"server_id":"N1"}\r\n',
            "something else than gRPC listens there: it answers b'INFO",
        ),
        (b"", "it takes connections and closes them at once"),
    ],
)
def test_the_port_of_something_else(answer: bytes, text: str) -> None:
    with plain_server(answer) as port:
        error = failure(f"127.0.0.1:{port}")
    assert error.metadata["cause"] == Cause.NOT_GRPC
    assert text in str(error)


@pytest.mark.parametrize("server", ["img2img.invalid:50051", "dns:///img2img.invalid:50051"])
def test_a_host_that_does_not_exist(server: str) -> None:
    error = failure(server)
    assert error.metadata["cause"] == Cause.HOST_NOT_FOUND
    assert "the host name img2img.invalid cannot be resolved" in str(error)


@pytest.mark.parametrize("tls", [False, True])
def test_a_port_where_nothing_listens(tls: bool) -> None:
    with serving(FakeService()) as port:
        pass
    error = failure(f"127.0.0.1:{port}", tls=tls)
    assert error.metadata["cause"] == Cause.REFUSED
    assert str(error).endswith("nothing listens there (connection refused)")


def test_an_address_that_refuses_does_not_hide_the_one_that_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As localhost is on many machines: ::1 first, where nothing listens."""
    real = socket.getaddrinfo

    def both(host: str, *given: object, **named: object) -> list[object]:
        ips = ["127.9.9.9", "127.0.0.1"] if host == "localhost" else [host]
        return [one for ip in ips for one in real(ip, *given, **named)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with tls_server("localhost") as port:
        finding = probe(Endpoint(f"localhost:{port}"))
    assert finding.cause is Cause.TLS_EXPECTED


def test_a_server_that_says_nothing_is_waited_for_briefly() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for tls in (False, True):
            began = time.monotonic()
            finding = probe(Endpoint(f"127.0.0.1:{silent.getsockname()[1]}", tls=tls), 0.2)
            assert time.monotonic() - began < 5.0
            assert finding.cause is Cause.NO_ANSWER


def test_a_resolver_that_hangs_is_waited_for_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30))
    began = time.monotonic()
    finding = probe(Endpoint("img2img.example.com"), 0.1)
    release.set()
    assert time.monotonic() - began < 5.0
    assert finding.cause is Cause.HOST_NOT_FOUND
    assert finding.what == "the host name img2img.example.com is not resolved in time"


def test_a_proxy_is_named_where_grpc_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeService()) as port:
        pass
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "intranet.example.com")
    error = failure("img2img.example.com:443")
    assert str(error).endswith("(through the proxy that https_proxy names)")


def test_the_async_client_says_the_same() -> None:
    async def main(port: int) -> str:
        async with AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=RETRY) as client:
            with pytest.raises(UnavailableError) as caught:
                await client.capabilities()
            with pytest.raises(UnavailableError) as streamed:
                await client.watch(1).result()
            assert str(streamed.value) == str(caught.value)
            return str(caught.value)

    with tls_server("localhost") as port:
        assert "the server seems to expect TLS" in asyncio.run(main(port))


def test_what_holds_no_certificate_is_refused_before_any_call() -> None:
    for junk in (b"# img2img\n", b"", AUTHORITY.private_key_pem.bytes(), b"\x30\x82\x01\x0a"):
        with pytest.raises(ValueError, match="root_certificates holds no usable PEM certificate"):
            Client("127.0.0.1:1", root_certificates=junk)


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
