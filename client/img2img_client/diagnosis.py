"""Finds out why a connection cannot be established.

gRPC's own messages name only the lowest layer ("OK", "Socket closed"). So after a failure this
module connects to the same address with Python's sockets and reports what it finds.
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
from img2img_client.channel import GRPC_ROOTS_VARIABLE, Endpoint, load_pair

PROBE_SECONDS = 2.0
# The first bytes of an HTTP/2 client: the preface, then an empty SETTINGS frame.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS_FRAME, FRAME_HEADER_BYTES = 4, 9
TLS_ALERT = b"\x15\x03"
# the environment variables of a proxy, in the order in which gRPC reads them
PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
GRPC_ROOTS = "_cython/_credentials/roots.pem"
# OpenSSL's codes of certificate errors, and its reasons for bytes that are not TLS.
NOT_YET_VALID, EXPIRED, WRONG_HOST, WRONG_ADDRESS = 9, 10, 62, 64
OTHER_NAME = "use a name of the certificate as server, or set it as tls_name (--tls-name)"
NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


class Cause(StrEnum):
    """Why a connection failed, as in `UnavailableError.metadata["cause"]`."""

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
    """The result of a probe. `text`: a clause for the error; empty: the connection works now."""

    cause: Cause
    text: str = ""


CONNECT_TIMEOUT = Finding(
    Cause.NO_ANSWER, f"no response within {PROBE_SECONDS:g} s: is a firewall in between?"
)
SILENT = Finding(Cause.NO_ANSWER, "it accepts connections but does not respond")
WORKS = Finding(Cause.UNKNOWN)


def explain(error: errors.RpcError, endpoint: Endpoint) -> errors.RpcError:
    """Returns the error with the cause if a connection failed, otherwise unchanged.

    Blocks for up to PROBE_SECONDS.
    """
    if not isinstance(error, errors.UnavailableError) or error.reason != errors.TRANSPORT:
        return error
    if proxy := _proxy(endpoint):
        text = f"{error} (through the proxy in the environment variable {proxy})"
        return errors.unavailable(text, cause=Cause.UNKNOWN.value)
    found = probe(endpoint)
    if found.text:
        text = f"cannot reach {endpoint.description}: {found.text}"
        return errors.unavailable(text, cause=found.cause.value)
    error.metadata.setdefault("cause", found.cause.value)
    return error


async def explain_async(error: errors.RpcError, endpoint: Endpoint) -> errors.RpcError:
    """Does what `explain` does, without blocking the event loop."""
    return await asyncio.to_thread(explain, error, endpoint)


def probe(endpoint: Endpoint, seconds: float = PROBE_SECONDS) -> Finding:
    """Connects to the endpoint as a call would, and returns the result within `seconds`."""
    if not endpoint.addresses:
        # The caller gave a channel, a unix socket, or a scheme that only gRPC knows.
        return WORKS
    probing = _Probe(endpoint, deadline=time.monotonic() + seconds)
    # Resolving a name cannot be interrupted, so it runs in a thread that may outlive this function.
    thread = threading.Thread(target=probing.run, name="img2img-probe", daemon=True)
    thread.start()
    thread.join(seconds + 0.2)
    return probing.found


class _Probe:
    """One probe of one endpoint. `found` is the result so far."""

    def __init__(self, endpoint: Endpoint, *, deadline: float) -> None:
        self._endpoint = endpoint
        self._host, self._port = endpoint.addresses[0]
        self._deadline = deadline
        self.found = Finding(
            Cause.HOST_NOT_FOUND, f"the host name {self._host} is not resolved in time"
        )

    def run(self) -> None:
        """Sets `found`; raises nothing, so that gRPC's own error is never hidden."""
        try:
            self.found = self._probe_host()
        except TimeoutError:
            self.found = SILENT
        except Exception as error:
            self.found = Finding(Cause.UNKNOWN, f"the connection fails: {error}")

    def _probe_host(self) -> Finding:
        addresses: list[tuple[str, int, str]] = []
        for host, port in self._endpoint.addresses:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                text = f"the host name {host} cannot be resolved: {_text(error)}"
                return Finding(Cause.HOST_NOT_FOUND, text)
            addresses += dict.fromkeys((host, port, str(address[0])) for *_, address in found)
        failures: list[OSError] = []
        for number, (host, port, ip) in enumerate(addresses):
            self._host, self._port = host, port
            self.found = CONNECT_TIMEOUT
            try:
                self._connect(ip, share=len(addresses) - number).close()
            except OSError as error:
                failures.append(error)
                continue
            # This address accepts connections. Failures of others (::1 of localhost) do not matter.
            self.found = SILENT
            return self._probe_tls(ip) if self._endpoint.uses_tls else self._probe_plain(ip)
        if any(isinstance(error, ConnectionRefusedError) for error in failures):
            return Finding(Cause.REFUSED, "nothing listens there (connection refused)")
        if any(isinstance(error, TimeoutError) for error in failures):
            return CONNECT_TIMEOUT
        text = _text(failures[0]) if failures else "the host name has no address"
        return Finding(Cause.UNREACHABLE, text)

    def _probe_tls(self, ip: str) -> Finding:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=_trusted(self._endpoint))
        context.set_alpn_protocols(["h2"])
        pair = self._endpoint.client_certificate
        if pair:
            load_pair(context, *pair)
        try:
            with (
                self._connect(ip) as plain,
                context.wrap_socket(plain, server_hostname=self._name) as connection,
            ):
                if connection.selected_alpn_protocol() != "h2":
                    text = "it speaks TLS but not HTTP/2, which gRPC needs: is the port right?"
                    return Finding(Cause.NOT_GRPC, text)
                # In TLS 1.3 a server that requires a client certificate rejects the first read.
                connection.sendall(PREFACE)
                if not connection.recv(FRAME_HEADER_BYTES):
                    text = "the server ends the TLS session: does it require a client certificate?"
                    if pair:
                        text = "the server ends the TLS session: does it trust client_certificate?"
                    return Finding(Cause.TLS_FAILED, text)
        except ssl.SSLCertVerificationError as error:
            return Finding(Cause.CERTIFICATE_REJECTED, self._certificate_text(error))
        except (ssl.SSLError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or ""
            # A TLS alert proves that the server speaks TLS. Other failures prove nothing.
            if reason in NOT_TLS or ("ALERT" not in reason and self._answers_plain(ip)):
                text = "the server does not speak TLS: leave out tls and root_certificates"
                return Finding(Cause.NO_TLS, f"{text} (--tls, --ca-file), or check the port")
            return Finding(Cause.TLS_FAILED, f"the TLS handshake fails: {_text(error)}")
        return WORKS

    def _certificate_text(self, error: ssl.SSLCertVerificationError) -> str:
        message = error.verify_message.rstrip(".")
        is_other_name = error.verify_code in (WRONG_HOST, WRONG_ADDRESS)
        problem = "for another name" if is_other_name else "not trusted"
        remedy = {
            NOT_YET_VALID: "check the clocks of this machine and of the server",
            EXPIRED: "the server needs a new one",
            WRONG_HOST: OTHER_NAME,
            WRONG_ADDRESS: OTHER_NAME,
        }.get(error.verify_code, "pass its authority as root_certificates (--ca-file)")
        return f"the certificate of {self._host} is {problem}: {message}; {remedy}"

    @property
    def _name(self) -> str:
        """The name that the certificate must contain."""
        return self._endpoint.tls_name or self._host

    def _probe_plain(self, ip: str) -> Finding:
        first = self._first_bytes(ip)
        if _is_http2(first):
            return WORKS
        # A server with TLS answers plain bytes with an alert, an HTTP page, or by closing.
        if first.startswith(TLS_ALERT) or self._accepts_tls(ip):
            text = "the server seems to expect TLS: use tls=True or root_certificates"
            return Finding(Cause.TLS_EXPECTED, f"{text} (--tls, --ca-file)")
        if _is_http1(first):
            text = "it answers with HTTP/1, not gRPC: is this the port of the HTTP gateway?"
        elif first:
            text = f"another kind of server listens there: it answers {first[:16]!r}"
        else:
            text = "it accepts connections and closes them at once"
        return Finding(Cause.NOT_GRPC, text)

    def _first_bytes(self, ip: str) -> bytes:
        """Returns the first bytes that a server sends without TLS, or b"" if it closes the
        connection.

        Raises TimeoutError.
        """
        try:
            with self._connect(ip) as connection:
                connection.sendall(PREFACE)
                return connection.recv(64)
        except ConnectionError:
            return b""

    def _answers_plain(self, ip: str) -> bool:
        try:
            first = self._first_bytes(ip)
        except TimeoutError:
            return False
        return _is_http2(first) or _is_http1(first)

    def _accepts_tls(self, ip: str) -> bool:
        context = ssl.create_default_context()
        # The probe sends no data, so it need not verify the server.
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            with self._connect(ip) as plain, context.wrap_socket(plain):
                return True
        except OSError:
            return False

    def _connect(self, ip: str, share: int = 1) -> socket.socket:
        """Connects within a part of the remaining time: the time divided by `share`."""
        left = max(0.05, (self._deadline - time.monotonic()) / share)
        return socket.create_connection((ip, self._port), timeout=left)


def _is_http2(first: bytes) -> bool:
    return len(first) >= FRAME_HEADER_BYTES and first[3] == SETTINGS_FRAME


def _is_http1(first: bytes) -> bool:
    return first.startswith((b"HTTP/", b"<"))  # An HTTP/0.9 server responds without a header.


def _text(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return getattr(error, "strerror", None) or str(error)


def _trusted(endpoint: Endpoint) -> str:
    """Returns the PEM of the authorities that gRPC trusts for this endpoint."""
    pem = endpoint.trusted_certificates
    if pem is None and (path := os.environ.get(GRPC_ROOTS_VARIABLE)):
        pem = Path(path).read_bytes()
    return (pem or pkgutil.get_data("grpc", GRPC_ROOTS) or b"").decode("ascii", errors="ignore")


def _proxy(endpoint: Endpoint) -> str:
    """Returns the variable that makes gRPC use a proxy for this endpoint; empty: no proxy."""
    if endpoint.is_loopback or len(endpoint.addresses) != 1:
        return ""
    [(host, _)] = endpoint.addresses
    exempt = next(filter(None, map(os.environ.get, ("no_grpc_proxy", "no_proxy"))), "")
    if any(host.endswith(end) for end in exempt.replace(",", " ").split()):
        return ""
    return next((name for name in PROXY_VARIABLES if os.environ.get(name)), "")
