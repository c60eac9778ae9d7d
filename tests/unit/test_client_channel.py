"""The address and the channel of the client, and the cost of importing it."""

from __future__ import annotations

import subprocess
import sys

import grpc
import pytest
import trustme

from img2img_client import Client, Retry
from img2img_client.channel import CHANNEL_OPTIONS, Endpoint
from img2img_server.api.server import server_options
from img2img_server.settings import Settings
from tests.fake_service import FakeService, serving


@pytest.mark.parametrize(
    ("server", "target", "is_loopback"),
    [
        ("127.0.0.1:50051", "127.0.0.1:50051", True),
        ("localhost", "localhost:50051", True),
        ("[::1]", "[::1]:50051", True),
        ("::1", "[::1]:50051", True),
        ("img2img.example.com:443", "img2img.example.com:443", False),
        ("10.0.0.7", "10.0.0.7:50051", False),
        ("dns:///img2img.prod:50051", "dns:///img2img.prod:50051", False),
        ("dns:img2img.prod", "dns:img2img.prod:50051", False),
        ("dns:///localhost", "dns:///localhost:50051", True),
        ("dns:///127.0.0.1:7", "dns:///127.0.0.1:7", True),
        ("dns://10.0.0.2/localhost:7", "dns://10.0.0.2/localhost:7", False),
        ("ipv4:127.0.0.1", "ipv4:127.0.0.1:50051", True),
        ("ipv4:127.0.0.1:7,127.0.0.2", "ipv4:127.0.0.1:7,127.0.0.2:50051", True),
        ("ipv4:127.0.0.1:7, 10.0.0.7:8", "ipv4:127.0.0.1:7,10.0.0.7:8", False),
        ("ipv6:::1,[::1]:7", "ipv6:[::1]:50051,[::1]:7", True),
        ("ipv6:[fd00::7]:50051", "ipv6:[fd00::7]:50051", False),
        ("unix-abstract:img2img", "unix-abstract:img2img", True),
        ("vsock:2:50051", "vsock:2:50051", False),
        ("unix:/run/img2img.sock", "unix:/run/img2img.sock", True),
    ],
)
def test_the_target_of_a_server_has_host_and_port(
    server: str, target: str, is_loopback: bool
) -> None:
    endpoint = Endpoint(server)
    assert (endpoint.target, endpoint.is_loopback) == (target, is_loopback)


def test_the_channel_is_encrypted_when_asked() -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    service = FakeService()
    with (
        serving(service, credentials=grpc.ssl_server_credentials([pair])) as port,
        Client(
            f"localhost:{port}", api_key="k", root_certificates=authority.cert_pem.bytes()
        ) as client,
    ):
        assert client.capabilities().server_version == "0.1.0"
    assert service.keys == ["Bearer k"]


@pytest.mark.parametrize("module", ["img2img_client", "img2img_client.cli"])
def test_importing_the_client_imports_no_large_package(module: str) -> None:
    heavy = ["img2img_server", "torch", "numpy", "PIL", "pydantic", "nats", "fastapi", "rich"]
    script = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"


def test_a_client_reconnects_before_the_server_cancels_its_job() -> None:
    """If a connection dies silently, the client must detect it before the server does."""
    ours, theirs = dict(CHANNEL_OPTIONS), dict(server_options(Settings()))
    noticed = ours["grpc.keepalive_time_ms"] + ours["grpc.http2.ping_timeout_ms"]
    back = noticed / 1000 + Retry().longest_delay_seconds
    earliest = min(theirs["grpc.keepalive_timeout_ms"], theirs["grpc.http2.ping_timeout_ms"]) / 1000
    assert back + 5 < earliest + Settings().disconnect_grace_seconds
    interval = theirs["grpc.http2.min_ping_interval_without_data_ms"]
    assert ours["grpc.keepalive_time_ms"] > interval, "the server calls that too many pings"
