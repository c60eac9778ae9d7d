"""Why a connection cannot be made: gRPC's own texts name the last layer ("OK", "Socket closed"), so
after a failure the same address is tried once more with Python's own sockets, and what they find is
said. Nothing here runs while calls succeed.
"""

from __future__ import annotations

import asyncio
import os
import pkgutil
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from img2img_client import errors
from img2img_client.channel import GRPC_ROOTS_VARIABLE, Endpoint

PROBE_SECONDS = 2.0
# The client's first bytes in HTTP/2: the preface, then an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS_FRAME, FRAME_HEADER_BYTES = 4, 9
TLS_ALERT = b"\x15\x03"
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")  # in gRPC's order
GRPC_ROOTS = "_cython/_credentials/roots.pem"
# OpenSSL's codes for what is wrong with a certificate, and its reasons for bytes that are not TLS.
NOT_YET_VALID, EXPIRED, WRONG_HOST, WRONG_ADDRESS = 9, 10, 62, 64
NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


class Cause(StrEnum):
    """Why there is no connection, as in `UnavailableError.metadata["cause"]`."""

    UNKNOWN = "UNKNOWN"
    HOST_NOT_FOUND = "HOST_NOT_FOUND"
    REFUSED = "REFUSED"
    UNREACHABLE = "UNREACHABLE"
    NO_ANSWER = "NO_ANSWER"
    NO_TLS = "NO_TLS"
    TLS_EXPECTED = "TLS_EXPECTED"
    TLS_FAILED = "TLS_FAILED"
    CERTIFICATE_REJECTED = "CERTIFICATE_REJECTED"
    NOT_GRPC = "NOT_GRPC"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a probe. `what` is a clause for the error; empty: the connection works now."""

    cause: Cause
    what: str = ""


NO_ANSWER = f"no answer within {PROBE_SECONDS:g} s: is a firewall in between?"
WORKS = Finding(Cause.UNKNOWN)
SILENT = Finding(Cause.NO_ANSWER, "it takes connections but does not answer")


def explain(error: errors.RpcError, endpoint: Endpoint) -> errors.RpcError:
    """The error with a better reason when it is a connection that failed, else as it is.

    Blocks for up to PROBE_SECONDS.
    """
    if not isinstance(error, errors.UnavailableError) or error.reason != errors.TRANSPORT:
        return error
    proxy = _proxy(endpoint)
    if proxy:
        text = f"{error} (through the proxy that {proxy} names)"
        return errors.UnavailableError(
            text, code=error.code, reason=error.reason, metadata={"cause": Cause.UNKNOWN.value}
        )
    found = probe(endpoint)
    if not found.what:
        error.metadata.setdefault("cause", found.cause.value)
        return error
    return errors.unavailable(endpoint.target, found.what, found.cause.value)


async def explain_async(error: errors.RpcError, endpoint: Endpoint) -> errors.RpcError:
    """Does the same as `explain`, without blocking the event loop."""
    return await asyncio.to_thread(explain, error, endpoint)


def probe(endpoint: Endpoint, seconds: float = PROBE_SECONDS) -> Finding:
    """Connects to the endpoint as a call would and returns what it finds within `seconds`."""
    address = endpoint.host_and_port
    if address is None:  # a unix socket, or a scheme that only gRPC knows
        return WORKS
    job = _Probe(endpoint, *address, deadline=time.monotonic() + seconds)
    # The resolver cannot be interrupted, so a thread that nobody waits for longer.
    thread = threading.Thread(target=job.run, name="img2img-probe", daemon=True)
    thread.start()
    thread.join(seconds + 0.2)
    return job.found


class _Probe:
    """One look at one endpoint. `found` is what is known so far."""

    def __init__(self, endpoint: Endpoint, host: str, port: int, *, deadline: float) -> None:
        self._endpoint = endpoint
        self._host, self._port = host, port
        self._deadline = deadline
        self.found = Finding(Cause.HOST_NOT_FOUND, f"the host name {host} is not resolved in time")

    def run(self) -> None:
        """Sets `found`; raises nothing."""
        try:
            self.found = self._look()
        except Exception as error:  # whatever else there is must not hide gRPC's own error
            self.found = Finding(Cause.UNKNOWN, f"the connection fails: {error}")

    def _look(self) -> Finding:
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            text = f"the host name {self._host} cannot be resolved: {_text(error)}"
            return Finding(Cause.HOST_NOT_FOUND, text)
        failures = []
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        for number, ip in enumerate(addresses):
            self.found = Finding(Cause.NO_ANSWER, NO_ANSWER)
            try:
                with self._connect(ip, share=len(addresses) - number):
                    pass
            except OSError as error:
                failures.append(error)
            else:  # this one answers: the others (::1 of localhost) must not hide what it says
                self.found = SILENT
                look = self._look_with_tls if self._endpoint.uses_tls else self._look_without_tls
                return look(ip)
        return _not_connected(failures)

    def _look_with_tls(self, ip: str) -> Finding:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=_trusted(self._endpoint))
        context.set_alpn_protocols(["h2"])
        try:
            with (
                self._connect(ip) as plain,
                context.wrap_socket(plain, server_hostname=self._host) as connection,
            ):
                if connection.selected_alpn_protocol() != "h2":
                    text = "it speaks TLS but not HTTP/2, which gRPC needs: is the port right?"
                    return Finding(Cause.NOT_GRPC, text)
                # With TLS 1.3 a refusal (no client certificate) arrives with the first read.
                connection.sendall(PREFACE)
                if not connection.recv(FRAME_HEADER_BYTES):
                    text = (
                        "the server ends the TLS session: does it ask for a certificate of yours?"
                    )
                    return Finding(Cause.TLS_FAILED, text)
        except ssl.SSLCertVerificationError as error:
            return Finding(Cause.CERTIFICATE_REJECTED, self._certificate_text(error))
        except (ssl.SSLError, ConnectionError) as error:
            return self._tls_failed(ip, error)
        except TimeoutError:
            return SILENT
        return WORKS

    def _tls_failed(self, ip: str, error: OSError) -> Finding:
        reason = getattr(error, "reason", None) or ""
        is_refused = "ALERT" in reason  # in TLS itself
        if reason in NOT_TLS or (not is_refused and self._speaks_plainly(ip)):
            text = "the server does not speak TLS: leave out tls and root_certificates"
            return Finding(Cause.NO_TLS, f"{text} (--tls, --ca-file), or check the port")
        return Finding(Cause.TLS_FAILED, f"the TLS handshake fails: {_text(error)}")

    def _certificate_text(self, error: ssl.SSLCertVerificationError) -> str:
        message = error.verify_message.rstrip(".")
        if error.verify_code in (WRONG_HOST, WRONG_ADDRESS):
            return (
                f"the certificate of {self._host} is for another name: {message}; "
                "use a name that stands in the certificate as server"
            )
        cure = {
            NOT_YET_VALID: "check the clocks of this machine and of the server",
            EXPIRED: "the server needs a new one",
        }.get(
            error.verify_code,
            "pass the certificate of its authority as root_certificates (--ca-file)",
        )
        return f"the certificate of {self._host} is not trusted: {message}; {cure}"

    def _look_without_tls(self, ip: str) -> Finding:
        try:
            first = self._read(ip)
        except TimeoutError:
            return SILENT
        if _is_http2(first):
            return WORKS
        # Some servers with TLS answer plain bytes with an alert, some with a page, some by closing.
        if first.startswith(TLS_ALERT) or self._takes_tls(ip):
            text = "the server seems to expect TLS: use tls=True or root_certificates"
            return Finding(Cause.TLS_EXPECTED, f"{text} (--tls, --ca-file)")
        if _is_http1(first):
            text = "it answers in HTTP/1, not in gRPC: is this the port of the HTTP gateway?"
            return Finding(Cause.NOT_GRPC, text)
        if not first:
            return Finding(Cause.NOT_GRPC, "it takes connections and closes them at once")
        text = f"something else than gRPC listens there: it answers {first[:16]!r}"
        return Finding(Cause.NOT_GRPC, text)

    def _read(self, ip: str) -> bytes:
        """The first bytes of a server that is spoken to without TLS; none when it closes."""
        try:
            with self._connect(ip) as connection:
                connection.sendall(PREFACE)
                return connection.recv(64)
        except ConnectionError:
            return b""

    def _speaks_plainly(self, ip: str) -> bool:
        """Whether the server answers without TLS."""
        try:
            first = self._read(ip)
        except TimeoutError:
            return False
        return _is_http2(first) or _is_http1(first)

    def _takes_tls(self, ip: str) -> bool:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
        try:
            with self._connect(ip) as plain, context.wrap_socket(plain):
                return True
        except OSError:
            return False

    def _connect(self, ip: str, share: int = 1) -> socket.socket:
        """A connection made within the time that is left, divided by `share`."""
        left = max(0.05, (self._deadline - time.monotonic()) / share)
        return socket.create_connection((ip, self._port), timeout=left)


def _not_connected(failures: list[OSError]) -> Finding:
    if any(isinstance(error, ConnectionRefusedError) for error in failures):
        return Finding(Cause.REFUSED, "nothing listens there (connection refused)")
    if any(isinstance(error, TimeoutError) for error in failures):
        return Finding(Cause.NO_ANSWER, NO_ANSWER)
    return Finding(Cause.UNREACHABLE, _text(failures[0]) if failures else "it has no address")


def _is_http2(first: bytes) -> bool:
    return len(first) >= FRAME_HEADER_BYTES and first[3] == SETTINGS_FRAME


def _is_http1(first: bytes) -> bool:
    return first.startswith((b"HTTP/", b"<"))  # a page alone: how HTTP/0.9 answers


def _text(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error)


def _trusted(endpoint: Endpoint) -> str:
    """The authorities that gRPC trusts for this endpoint, as PEM."""
    pem = endpoint.trusted_certificates
    if pem is None and (path := os.environ.get(GRPC_ROOTS_VARIABLE)):
        pem = Path(path).read_bytes()
    return (pem or pkgutil.get_data("grpc", GRPC_ROOTS) or b"").decode("ascii", errors="ignore")


def _proxy(endpoint: Endpoint) -> str:
    """The variable that makes gRPC use a proxy for this endpoint; empty when it uses none."""
    address = endpoint.host_and_port
    if endpoint.is_loopback or address is None:
        return ""
    exempt = ""
    for name in ("no_grpc_proxy", "no_proxy"):
        exempt = exempt or os.environ.get(name, "")
    if any(address[0].endswith(end) for end in exempt.replace(",", " ").split()):
        return ""
    return next((name for name in PROXY_VARIABLES if os.environ.get(name)), "")
