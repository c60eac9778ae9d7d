"""The service's address and the options of its channel, the same for both clients."""

from __future__ import annotations

import json
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import grpc

from img2img_client.errors import InvalidArgumentError, Violation, invalid, invalid_type
from img2img_client.requests import MAX_MESSAGE_BYTES
from img2img_client.targets import Target, parse

SERVER_VARIABLE = "IMG2IMG_SERVER"
KEY_VARIABLE = "IMG2IMG_API_KEY"
GRPC_ROOTS_VARIABLE = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"
DEFAULT_SERVER = "127.0.0.1:50051"

# Spreads the calls over all replicas behind a host name or in a list of addresses.
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
    # After a lost connection, ask DNS again soon: all replicas may have new addresses. gRPC waits
    # for 30 s, in which calls would fail.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ("grpc.service_config", SERVICE_CONFIG),
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The service's address and how to authenticate there.

    `server`: "host:port", "host" (port 50051), several addresses such as
    "ipv4:10.0.0.7:50051,10.0.0.8:50051", or a target that gRPC knows, such as "dns:///name:port" or
    "unix:/path"; None: the caller gave a channel. `root_certificates`: PEM that turns TLS on.
    `tls_name`: the name in the certificate, if it is not the host. `client_certificate`: PEM of a
    certificate chain and of its key, for a server that requires them.
    """

    server: str | None
    api_key: str | None = None
    tls: bool = False
    root_certificates: bytes | None = None
    tls_name: str | None = None
    client_certificate: tuple[bytes, bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError if a value can never work."""
        if self.server is not None:
            self._check_server(self.server)
        if self.api_key is not None:
            object.__setattr__(self, "api_key", clean_key(self.api_key))
        if self.root_certificates is not None:
            check_certificates(self.root_certificates, "root_certificates")
        self._check_tls_name()
        if self.client_certificate is not None:
            self._check_client_certificate(self.client_certificate)

    def _check_server(self, server: str) -> None:
        if not isinstance(server, str):
            raise invalid_type("server", "a str", server)
        object.__setattr__(self, "server", server.strip())
        parse(server)

    def _check_tls_name(self) -> None:
        if self.tls_name is not None and not isinstance(self.tls_name, str):
            raise invalid_type("tls_name", "a str", self.tls_name)
        if self.tls_name and not self.uses_tls:
            text = "tls_name is set without TLS: set tls or root_certificates too"
            raise invalid("tls_name", "NOT_SUPPORTED", text)
        if self.uses_tls and not self.tls_name and len(self.addresses) > 1:
            text = (
                "tls_name is missing: the certificates of several addresses are checked for one "
                "name, so set the name that all of them contain"
            )
            raise invalid("tls_name", "REQUIRED", text)

    def _check_client_certificate(self, pair: tuple[bytes, bytes]) -> None:
        name = "client_certificate"
        if not (
            isinstance(pair, tuple)
            and len(pair) == 2
            and all(isinstance(each, bytes) for each in pair)
        ):
            raise invalid_type(name, "two PEM files as bytes, certificate and key", pair)
        if not self.uses_tls:
            text = f"{name} is set without TLS: set tls or root_certificates too"
            raise invalid(name, "NOT_SUPPORTED", text)
        if fault := _pair_fault(*pair):
            raise invalid(name, "INVALID_FORMAT", f"{name} cannot be used: {fault}")

    @classmethod
    def choose(
        cls,
        server: str | None = None,
        api_key: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        tls_name: str | None = None,
        client_certificate: tuple[bytes, bytes] | None = None,
    ) -> Self:
        """Returns the endpoint of a client; omitted values come from the environment.

        Raises:
            InvalidArgumentError: a value can never work.
        """
        if server is None:
            server = os.environ.get(SERVER_VARIABLE) or DEFAULT_SERVER
        key = _key_or_default(api_key)
        return cls(server, key, tls, root_certificates, tls_name, client_certificate)

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
        return self._target.text

    @property
    def _target(self) -> Target:
        return parse(self.server) if self.server else Target("")

    @property
    def description(self) -> str:
        """The name of the service in error messages."""
        return f"the service at {self.target}" if self.target else "the service"

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """The host and port of each address of the target; empty if it has another form."""
        return self._target.addresses

    @property
    def is_loopback(self) -> bool:
        """Whether the service runs on this machine."""
        return self._target.is_loopback

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
        if not self.uses_tls:
            return None
        chain, key = self.client_certificate or (None, None)
        return grpc.ssl_channel_credentials(self.trusted_certificates, key, chain)

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
        """Channel options. Loopback connections bypass the proxy of the environment, and so do
        several addresses, which gRPC would pass to a proxy as one name."""
        is_direct = self.is_loopback or len(self.addresses) > 1
        own: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0 if is_direct else 1)]
        if self.tls_name:
            own.append(("grpc.ssl_target_name_override", self.tls_name))
        return [*CHANNEL_OPTIONS, *own]


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


def load_pair(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Loads a certificate and its key. Raises ssl.SSLError or ValueError."""
    with TemporaryDirectory() as folder:  # OpenSSL reads them from files only.
        file = Path(folder, "pair.pem")
        file.touch(mode=0o600)
        file.write_bytes(key + b"\n" + chain)
        # Without a function for the passphrase, OpenSSL would ask at the terminal.
        context.load_cert_chain(file, password=lambda: "")


def _pair_fault(chain: bytes, key: bytes) -> str:
    """Returns why a certificate and its key cannot be used, or an empty text."""
    try:
        load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), chain, key)
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            return "the key is not that of the certificate"
        return "it must be a certificate and its key without a passphrase, both in PEM format"
    return ""


def check_certificates(pem: bytes, source: str) -> None:
    """Raises InvalidArgumentError, naming `source`, when `pem` contains no certificate."""
    if not isinstance(pem, bytes):
        raise invalid_type("root_certificates", "the bytes of a PEM file", pem)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (UnicodeDecodeError, ValueError, ssl.SSLError) as error:
        text = f"{source} contains no valid PEM certificate (-----BEGIN CERTIFICATE-----)"
        raise invalid("root_certificates", "INVALID_FORMAT", text) from error
