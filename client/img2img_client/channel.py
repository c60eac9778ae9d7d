"""The service's address and the options of its channel, the same for both clients."""

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

from img2img_client.errors import InvalidArgumentError, Violation, invalid, invalid_type
from img2img_client.requests import MAX_MESSAGE_BYTES

SERVER_VARIABLE = "IMG2IMG_SERVER"
KEY_VARIABLE = "IMG2IMG_API_KEY"
GRPC_ROOTS_VARIABLE = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_PORT = 50051
# the schemes of gRPC targets
SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")

# Spreads the calls over all replicas behind a host name.
SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # gRPC detects a dead connection within 30 s while calls are open. The server detects it after
    # 30 s at the earliest, and then waits 15 s for this client before it cancels the job.
    # ping_timeout (default 60 s) limits the wait for the response to a ping; keepalive_timeout
    # limits how long sent data may stay unacknowledged.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnect soon after a restart of the server: by default gRPC waits up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # This also bounds one attempt to connect. The default, 20 s, exceeds `Retry.connect_seconds`.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.service_config", SERVICE_CONFIG),
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The service's address and how to authenticate there.

    `server`: "host:port", "host" (port 50051), or a target that gRPC knows, such as
    "dns:///name:port" or "unix:/path"; None: the caller gave a channel. `root_certificates`: PEM
    that turns TLS on.
    """

    server: str | None
    api_key: str | None = None
    tls: bool = False
    root_certificates: bytes | None = None

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError if a value can never work."""
        if self.server is not None:
            self._check_server(self.server)
        if self.api_key is not None:
            object.__setattr__(self, "api_key", clean_key(self.api_key))
        if self.root_certificates is not None:
            check_certificates(self.root_certificates, "root_certificates")

    def _check_server(self, server: str) -> None:
        if not isinstance(server, str):
            raise invalid_type("server", "a str", server)
        object.__setattr__(self, "server", server.strip())
        host, port = self.host_and_port or ("", 0)
        is_pair = bool(host) and not re.search(r"\s", host) and 0 < port < 65536
        if server.startswith(("http://", "https://")):
            text = f"server must be host:port without http://, not {server!r}"
            raise invalid("server", "INVALID_FORMAT", text)
        if not is_pair and not self.target.startswith(SCHEMES):
            text = f"server must be host:port with a port from 1 to 65535, not {server!r}"
            raise invalid("server", "INVALID_FORMAT", text)

    @classmethod
    def choose(
        cls,
        server: str | None = None,
        api_key: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
    ) -> Self:
        """Returns the endpoint of a client; omitted values come from the environment.

        Raises:
            InvalidArgumentError: a value can never work.
        """
        if server is None:
            server = os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER
        return cls(server, _key_or_default(api_key), tls, root_certificates)

    @classmethod
    def of_channel(cls, api_key: str | None, **others: object) -> Self:
        """Returns the endpoint of a client whose caller gave the channel.

        Raises:
            InvalidArgumentError: one of `others` is set, but belongs to the channel.
        """
        if refused := [name for name, value in others.items() if value]:
            text = "cannot be combined with channel: set it when you open the channel"
            raise InvalidArgumentError(
                *(Violation(name, f"{name} {text}", "NOT_SUPPORTED") for name in refused)
            )
        return cls(None, _key_or_default(api_key))

    @property
    def target(self) -> str:
        """The address with its port; empty when the caller gave a channel."""
        server = self.server or ""
        if not server or "/" in server or server.startswith(SCHEMES):
            return server
        bare_v6 = server.count(":") > 1 and not server.startswith("[")
        host = f"[{server}]" if bare_v6 else server
        has_port = ":" in host.rpartition("]")[2]
        return host if has_port else f"{host}:{DEFAULT_PORT}"

    @property
    def description(self) -> str:
        """The name of the service in error messages."""
        return f"the service at {self.target}" if self.target else "the service"

    @property
    def host_and_port(self) -> tuple[str, int] | None:
        """The host and port of the target; None if the target has another form."""
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
            return host == "localhost" or self.target.startswith("unix:")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.tls or self.root_certificates is not None

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """The channel credentials; None without TLS."""
        return grpc.ssl_channel_credentials(self.trusted_certificates) if self.uses_tls else None

    @property
    def trusted_certificates(self) -> bytes | None:
        """PEM of the authorities for TLS. None: gRPC's default, the file that its variable names or
        its built-in list."""
        if self.root_certificates is not None or os.environ.get(GRPC_ROOTS_VARIABLE):
            return self.root_certificates
        system = ssl.get_default_verify_paths().cafile
        try:
            return Path(system).read_bytes() if system else None
        except OSError:
            return None

    @property
    def options(self) -> list[tuple[str, Any]]:
        """Channel options. A loopback connection bypasses the proxy of the environment."""
        return [*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0 if self.is_loopback else 1)]


def _key_or_default(api_key: str | None) -> str | None:
    return os.environ.get(KEY_VARIABLE) if api_key is None else api_key


def clean_key(key: str) -> str:
    """Returns the key without surrounding white space, which reading it from a file may add.

    Raises:
        InvalidArgumentError: a header cannot carry the key. The message does not contain the key.
    """
    if not isinstance(key, str):
        raise invalid_type("api_key", "a str", key)
    key = key.strip()
    for position, character in enumerate(key, 1):
        if not "!" <= character <= "~":
            text = (
                f"api_key cannot be used: character {position} is U+{ord(character):04X}; a key "
                "consists of ASCII letters, digits and punctuation, without spaces"
            )
            raise invalid("api_key", "INVALID_FORMAT", text)
    return key


def check_certificates(pem: bytes, source: str) -> None:
    """Raises InvalidArgumentError, naming `source`, when `pem` contains no certificate."""
    if not isinstance(pem, bytes):
        raise invalid_type("root_certificates", "the bytes of a PEM file", pem)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (UnicodeDecodeError, ValueError, ssl.SSLError) as error:
        text = f"{source} contains no valid PEM certificate (-----BEGIN CERTIFICATE-----)"
        raise invalid("root_certificates", "INVALID_FORMAT", text) from error
