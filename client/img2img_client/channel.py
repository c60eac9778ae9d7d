"""Where the service is and how its channel is set up, the same for both clients."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any

import grpc

from img2img_client.request import MAX_MESSAGE_BYTES

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_PORT = 50051

# A long-lived client uses every replica behind a name with several addresses.
SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A connection that died silently is noticed within 40 s; only while calls are open.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted server is found again soon: gRPC itself would wait up to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
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
        if self.server.startswith(("http://", "https://")):
            raise ValueError(f"server is host:port without http://, not {self.server!r}")

    @property
    def target(self) -> str:
        """The address with its port."""
        if "/" in self.server or self.server.startswith("unix:"):
            return self.server
        bare_v6 = self.server.count(":") > 1 and not self.server.startswith("[")
        host = f"[{self.server}]" if bare_v6 else self.server
        has_port = ":" in host.rpartition("]")[2]
        return host if has_port else f"{host}:{DEFAULT_PORT}"

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
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None: without TLS."""
        if self.tls or self.root_certificates:
            return grpc.ssl_channel_credentials(self.root_certificates)
        return None

    @property
    def options(self) -> list[tuple[str, Any]]:
        """Channel options; a proxy of the environment is not asked for this very machine."""
        return [*OPTIONS, ("grpc.enable_http_proxy", 0 if self.is_loopback else 1)]
