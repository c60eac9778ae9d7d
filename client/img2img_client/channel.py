"""Where the service is and how its channel is set up, the same for both clients."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

from img2img_client.errors import InvalidArgumentError, InvalidArgumentTypeError, Violation
from img2img_client.requests import MAX_MESSAGE_BYTES

SERVER_VARIABLE = "IMG2IMG_SERVER"
KEY_VARIABLE = "IMG2IMG_API_KEY"
GRPC_ROOTS_VARIABLE = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_PORT = 50051
SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")  # gRPC's

# A long-lived client uses every replica behind a name with several addresses.
SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A connection that died silently is noticed within 30 s; only while calls are open. The server
    # notices after 30 s at the earliest and then waits 15 s for us before it cancels our job.
    # gRPC waits for the answer to a ping as long as ping_timeout says, 60 s by default, whatever
    # keepalive_timeout is; that one bounds how long sent data may stay unacknowledged.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server is found again soon: gRPC itself would wait up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Also the time for one attempt to connect: gRPC's 20 s would outlast `Retry.connect_seconds`.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.service_config", SERVICE_CONFIG),
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach and address the service.

    `server`: "host:port", "host" (port 50051), or a target that gRPC knows, such as
    "dns:///name:port" or "unix:/path". `root_certificates`: PEM; given, it turns TLS on.
    """

    server: str
    api_key: str | None = None
    tls: bool = False
    root_certificates: bytes | None = None

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError: something of it can never work."""
        if not isinstance(self.server, str):
            text = f"server must be a text, not {type(self.server).__name__}"
            raise InvalidArgumentTypeError(Violation("server", text))
        if self.server.startswith(("http://", "https://")):
            text = f"server is host:port without http://, not {self.server!r}"
            raise InvalidArgumentError(Violation("server", text))
        object.__setattr__(self, "server", self.server.strip())
        host, port = self.host_and_port or ("", 0)
        is_pair = bool(host) and not re.search(r"\s", host) and 0 < port < 65536
        if not is_pair and not self.server.startswith(SCHEMES):
            text = f"server is host:port with a port from 1 to 65535, not {self.server!r}"
            raise InvalidArgumentError(Violation("server", text))
        if self.api_key is not None:
            object.__setattr__(self, "api_key", clean_key(self.api_key))
        if self.root_certificates is not None:
            check_certificates(self.root_certificates, "root_certificates")

    @classmethod
    def choose(
        cls,
        server: str | None = None,
        api_key: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
    ) -> Self:
        """The endpoint of a client: what is left out comes from the environment.

        Raises:
            InvalidArgumentError: something of it can never work.
        """
        if server is None:
            server = os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER
        if api_key is None:
            api_key = os.environ.get(KEY_VARIABLE)
        return cls(server, api_key, tls, root_certificates)

    @property
    def target(self) -> str:
        """The address with its port."""
        if "/" in self.server or self.server.startswith(SCHEMES):
            return self.server
        bare_v6 = self.server.count(":") > 1 and not self.server.startswith("[")
        host = f"[{self.server}]" if bare_v6 else self.server
        has_port = ":" in host.rpartition("]")[2]
        return host if has_port else f"{host}:{DEFAULT_PORT}"

    @property
    def host_and_port(self) -> tuple[str, int] | None:
        """The host and port behind the target; None when it is not one such pair."""
        match = re.fullmatch(
            r"(?:dns:(?://[^/]*/)?)?(?:\[([^\]]*)\]|([^/\[\]:]*)):(\d{1,9})", self.target
        )
        return (match[1] or match[2] or "", int(match[3])) if match else None

    @property
    def is_loopback(self) -> bool:
        """Whether the service runs on this machine."""
        host = self.target.rpartition(":")[0].strip("[]")
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or self.server.startswith("unix:")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or self.root_certificates is not None

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: without TLS."""
        if self.uses_tls:
            return grpc.ssl_channel_credentials(self.trusted_certificates)
        return None

    @property
    def trusted_certificates(self) -> bytes | None:
        """PEM of the authorities that a server with TLS is checked against; None: gRPC's choice,
        which is the file that its variable names, else a list that comes with it."""
        if self.root_certificates is not None or os.environ.get(GRPC_ROOTS_VARIABLE):
            return self.root_certificates
        system = ssl.get_default_verify_paths().cafile
        try:
            return Path(system).read_bytes() if system else None
        except OSError:
            return None

    @property
    def options(self) -> list[tuple[str, Any]]:
        """Channel options; a proxy of the environment is not asked for this very machine."""
        return [*OPTIONS, ("grpc.enable_http_proxy", 0 if self.is_loopback else 1)]


def clean_key(key: str) -> str:
    """The key without the white space around it, which a file read as text brings.

    Raises:
        InvalidArgumentError: it holds what no key holds and no header can carry. The text does not
            show the key.
    """
    if not isinstance(key, str):
        text = f"api_key must be a text, not {type(key).__name__}"
        raise InvalidArgumentTypeError(Violation("api_key", text))
    key = key.strip()
    for place, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            text = (
                f"api_key cannot be used: character {place} is U+{ord(character):04X}; a key is "
                "made of ASCII letters, digits and signs, without spaces"
            )
            raise InvalidArgumentError(Violation("api_key", text))
    return key


def check_certificates(pem: bytes, name: str) -> None:
    """Raises InvalidArgumentError when `pem` holds no certificate. `name`: for the sentence."""
    if not isinstance(pem, bytes):
        text = f"{name} must be the bytes of a PEM file, not {type(pem).__name__}"
        raise InvalidArgumentTypeError(Violation("root_certificates", text))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (UnicodeDecodeError, ValueError, ssl.SSLError) as error:
        text = f"{name} holds no usable PEM certificate (-----BEGIN CERTIFICATE-----)"
        raise InvalidArgumentError(Violation("root_certificates", text)) from error
