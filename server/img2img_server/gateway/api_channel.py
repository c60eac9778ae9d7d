"""The gateway's channel to the api."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final, Self

import grpc

from img2img_server.certificates import read_pair, read_trusted
from img2img_server.reloaded_files import ReloadedFiles
from img2img_server.settings import Settings

SERVICE: Final = "img2img.v1.Img2ImgService"
_CLOSE_SECONDS: Final = 600.0  # how long the calls of a replaced channel may take to end
_READS: Final = ("GetCaller", "GetCapabilities", "GetJob", "ListJobs", "EstimateJob")
# Methods without side effects are retried, for the time when one api stops and another one starts.
_RETRIED = [
    {"service": "img2img.v1.AdminService", "method": "GetSystemDetails"},
    *({"service": SERVICE, "method": name} for name in _READS),
]
_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [{"name": _RETRIED, "retryPolicy": _RETRY_POLICY}],
}


def connect(settings: Settings) -> grpc.aio.Channel:
    """Returns a channel to the api. It connects on first use, and again after a lost connection.

    Raises:
        SettingsError: a file of certificates cannot be used.
    """
    options: list[tuple[str, int | str]] = [
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # Detect a dead connection within 40 s, also while no stream sends anything.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Without this option, gRPC waits for 60 s regardless of the line above.
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.enable_http_proxy", int(settings.use_proxy_environment)),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ]
    if settings.api_ca_file is None:
        return grpc.aio.insecure_channel(settings.api_address, options=options)
    names = [name for name in _TLS_FILES if getattr(settings, name)]
    credentials = ReloadedFiles(
        "api_certificates",
        [getattr(settings, name) for name in names],
        lambda: _credentials(settings),
    )
    return _TlsChannel(
        credentials,
        lambda current: grpc.aio.secure_channel(settings.api_address, current, options=options),
    )


_TLS_FILES: Final = ("api_ca_file", "api_cert_file", "api_key_file")


def _credentials(settings: Settings) -> grpc.ChannelCredentials:
    authority = read_trusted(settings, "api_ca_file")
    if settings.api_cert_file is None:
        return grpc.ssl_channel_credentials(authority)
    key, certificate = read_pair(settings, "api_cert_file", "api_key_file")
    return grpc.ssl_channel_credentials(authority, key, certificate)


class _TlsChannel(grpc.aio.Channel):
    """A channel that is replaced when its certificates change. Running calls stay on the old one.

    gRPC keeps the certificates of a channel for ever: after they have expired, no connection would
    succeed.
    """

    def __init__(
        self,
        credentials: ReloadedFiles[grpc.ChannelCredentials],
        open_channel: Callable[[grpc.ChannelCredentials], grpc.aio.Channel],
    ) -> None:
        self._credentials = credentials
        self._open = open_channel
        self._used = credentials.current()
        self._channel = open_channel(self._used)
        self._closing: set[asyncio.Task[None]] = set()

    def _current(self) -> grpc.aio.Channel:
        if (newest := self._credentials.current()) is not self._used:
            closing = asyncio.create_task(self._channel.close(_CLOSE_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._used, self._channel = newest, self._open(newest)
        return self._channel

    def _each_time(self, kind: str, *names: Any, **options: Any) -> Any:
        """Returns a method that looks up the channel at each call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._current(), kind)(*names, **options)(*args, **kwargs)

        return call

    def unary_unary(self, *names: Any, **options: Any) -> Any:
        return self._each_time("unary_unary", *names, **options)

    def unary_stream(self, *names: Any, **options: Any) -> Any:
        return self._each_time("unary_stream", *names, **options)

    def stream_unary(self, *names: Any, **options: Any) -> Any:
        return self._each_time("stream_unary", *names, **options)

    def stream_stream(self, *names: Any, **options: Any) -> Any:
        return self._each_time("stream_stream", *names, **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for closing in self._closing:
            closing.cancel()
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()
