"""Webhooks of the api role with its own settings, on real NATS and a real bucket."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from functools import partial

import grpc
import pytest
from receiver import SECRET, receiving
from standardwebhooks import Webhook

from img2img_server.api.server import Webhooks, serve_api
from img2img_server.compat.modelslab.files import inline
from img2img_server.errors import StorageError
from img2img_server.nats.bus import connect_bus
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.webhooks.dispatcher import BackoffPolicy
from img2img_server.webhooks.sender import webhook_sender
from img2img_server.webhooks.signature import Signer
from tests.stack import Api, running_api, running_worker, settings, spec


@pytest.mark.parametrize("as_text", [False, True])
async def test_the_role_signs_with_its_secret_and_puts_texts_where_the_operator_wants_them(
    engine_settings: Callable[..., Settings], as_text: bool
) -> None:
    config = engine_settings(
        grpc_port=0,
        metrics_port=0,
        dev_key=True,
        default_model="fake",
        outbound_allow="127.0.0.1",
        webhook_secret=SECRET,
        base64_inline=as_text,
        drain_seconds=2.0,
    )
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    async with (
        connect_bus(config) as bus,
        connect_blobs(config) as blobs,
        receiving() as receiver,
        running_worker(bus, blobs=blobs),  # type: ignore[arg-type]
    ):
        await blobs.prepare()
        serving = asyncio.create_task(serve_api(config, stop, address.set_result))
        await asyncio.wait({serving, address}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        async with grpc.aio.insecure_channel(address.result()) as channel:
            api = Api(address.result(), channel, stop)
            job = await api.create(spec(webhook=receiver.url, base64=True))
            got = await receiver.next()
        stop.set()
        await serving
    found = Webhook(SECRET).verify(got.body, got.headers)
    (output,) = found["output"]
    if as_text:
        assert base64.b64decode(output, validate=True).startswith(b"\x89PNG")
    else:
        assert found["output"] == list(job.future_urls)
    assert found["proxy_links"] == found["output"]


async def test_a_bad_secret_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(SettingsError, match="IMG2IMG_WEBHOOK_SECRET"):
        await serve_api(settings(webhook_secret="secret"), asyncio.Event())


async def test_texts_that_cannot_be_read_now_are_a_failed_attempt() -> None:
    class Away(MemoryBlobStore):
        away = True

        def read(self, key: str):  # type: ignore[no-untyped-def]
            if self.away:
                Away.away = False
                raise StorageError("the bucket is away")
            return super().read(key)

    bus, blobs = memory_bus(), Away()
    post = webhook_sender(OutboundPolicy.parse("127.0.0.1"))
    async with receiving() as receiver, running_worker(bus, blobs=blobs):
        webhooks = Webhooks(
            post, Signer(SECRET), BackoffPolicy((0.02,) * 7), partial(inline, blobs)
        )
        config = settings(outbound_allow="127.0.0.1")
        async with running_api(bus, config, webhooks=webhooks) as api:
            await api.create(spec(webhook=receiver.url, base64=True))
            got = await receiver.next()  # The first attempt failed before the request was sent.
            found = Webhook(SECRET).verify(got.body, got.headers)
            assert base64.b64decode(found["output"][0]).startswith(b"\x89PNG")
            assert not Away.away
