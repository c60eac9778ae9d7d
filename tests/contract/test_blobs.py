"""Files by key, in memory and in a real bucket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest
from fastapi import FastAPI
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule
from prometheus_client import REGISTRY

from img2img_server.errors import StorageError
from img2img_server.gateway.http.files import Files
from img2img_server.settings import Settings
from img2img_server.storage import s3_blobs
from img2img_server.storage.interface import BlobInfo, BlobStore
from img2img_server.storage.s3_blobs import connect_blobs

KEY = "generations/5f0c2a6e-0.png"


async def content(blobs: BlobStore, key: str) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(key)])


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, 1_000_003])
async def test_a_file_comes_back_as_it_was_put(blobs: BlobStore, size: int) -> None:
    data = os.urandom(size)
    await blobs.put(KEY, data, "image/png")
    assert await blobs.stat(KEY) == BlobInfo(key=KEY, size_bytes=size, media_type="image/png")
    assert await content(blobs, KEY) == data


async def test_a_large_file_comes_in_chunks(blobs: BlobStore) -> None:
    await blobs.put(KEY, bytes(200_000), "image/png")
    sizes = [len(chunk) async for chunk in blobs.read(KEY)]
    assert sum(sizes) == 200_000
    assert max(sizes) <= 64 * 1024


async def test_a_file_that_was_never_put_is_not_there(blobs: BlobStore) -> None:
    assert await blobs.stat(KEY) is None
    with pytest.raises(KeyError):
        await content(blobs, KEY)


async def test_a_file_put_again_is_replaced(blobs: BlobStore) -> None:
    await blobs.put(KEY, b"first, and longer", "image/png")
    await blobs.put(KEY, b"second", "text/plain")
    assert await blobs.stat(KEY) == BlobInfo(key=KEY, size_bytes=6, media_type="text/plain")
    assert await content(blobs, KEY) == b"second"


async def test_a_file_is_seen_whole_or_not_at_all(blobs: BlobStore) -> None:
    data = os.urandom(2_000_000)
    putting = asyncio.create_task(blobs.put(KEY, data, "image/png"))
    seen = set()
    while not putting.done():
        info = await blobs.stat(KEY)
        seen.add(info.size_bytes if info else None)
        await asyncio.sleep(0)  # In memory, only this lets the put begin.
    await putting
    assert seen <= {None, len(data)}
    assert await content(blobs, KEY) == data


async def test_a_deleted_file_is_gone(blobs: BlobStore) -> None:
    await blobs.put(KEY, b"x", "image/png")
    await blobs.delete(KEY)
    await blobs.delete(KEY)
    assert await blobs.stat(KEY) is None


async def test_a_file_whose_put_was_cancelled_is_gone_once_it_was_deleted(
    open_blobs: Callable[[], AbstractAsyncContextManager[BlobStore]],
) -> None:
    async with open_blobs() as blobs:
        await blobs.prepare()
        putting = asyncio.create_task(blobs.put(KEY, os.urandom(4_000_000), "image/png"))
        await asyncio.sleep(0)  # A thread is executing the put.
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)
        await blobs.delete(KEY)
    async with open_blobs() as blobs:  # Closing the first store has waited for its threads.
        assert await blobs.stat(KEY) is None


async def test_without_a_bucket_nothing_is_stored(unprepared_blobs: BlobStore) -> None:
    assert await unprepared_blobs.stat(KEY) is None
    with pytest.raises(StorageError):
        await unprepared_blobs.put(KEY, b"x", "image/png")


async def test_preparing_again_changes_nothing(blobs: BlobStore) -> None:
    await blobs.put(KEY, b"x", "image/png")
    await blobs.prepare()
    assert await content(blobs, KEY) == b"x"


def minio(settings: Settings) -> Minio:
    return Minio(
        settings.s3_endpoint_url.removeprefix("http://"),
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
        secure=False,
    )


def rules(client: Minio, bucket: str) -> list[tuple[str | None, str | None, int | None]]:
    config = client.get_bucket_lifecycle(bucket)
    assert config is not None
    return sorted(
        (
            rule.rule_id,
            rule.rule_filter.prefix if rule.rule_filter else None,
            rule.expiration.days if rule.expiration else None,
        )
        for rule in config.rules
    )


async def test_the_bucket_expires_our_files_and_keeps_the_rules_of_others(
    engine_settings: Callable[..., Settings],
) -> None:

    settings = engine_settings(retention_hours=25)
    client = minio(settings)
    foreign = Rule(ENABLED, Filter(prefix="logs/"), "operator", expiration=Expiration(days=90))
    client.make_bucket(settings.s3_bucket)
    client.set_bucket_lifecycle(settings.s3_bucket, LifecycleConfig([foreign]))
    async with connect_blobs(settings) as store:
        await store.prepare()
        await store.prepare()
    assert rules(client, settings.s3_bucket) == [
        ("img2img-generations", "generations/", 2),
        ("img2img-temp", "temp/", 2),
        ("img2img-uploads", "uploads/", 1),
        ("operator", "logs/", 90),
    ]


async def test_shared_caches_may_not_keep_a_file_whether_it_comes_from_the_bucket_or_the_gateway(
    engine_settings: Callable[..., Settings],
) -> None:
    key = "generations/3f8a1c52-6d0e-4b7a-9c41-5e2d7f90ab16-0.png"
    settings = engine_settings(retention_hours=1)
    async with connect_blobs(settings) as store:
        await store.prepare()
        await store.put(key, b"x", "image/png")
        app = FastAPI()
        app.get("/generations/{name}")(Files(store).serve)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            gateway = (await http.get(f"/{key}")).headers
    bucket = minio(settings).stat_object(settings.s3_bucket, key).metadata
    assert bucket is not None
    assert bucket["Cache-Control"] == "private, max-age=3600, immutable"
    assert gateway["Cache-Control"] == bucket["Cache-Control"]


def outcomes(outcome: str) -> float:
    """Returns the number of calls of the store with this outcome."""
    return REGISTRY.get_sample_value("img2img_store_calls_total", {"outcome": outcome}) or 0.0


async def test_a_store_that_is_down_is_tried_three_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, failed = 0, outcomes("failed")

    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        writer.close()

    quick = s3_blobs.RETRIES.new(backoff_factor=0.0, backoff_jitter=0.0)
    monkeypatch.setattr(s3_blobs, "RETRIES", quick)
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        settings = Settings(
            s3_endpoint_url=f"http://{host}:{port}", s3_access_key="a", s3_secret_key="b" * 8
        )
        async with connect_blobs(settings) as store:
            with pytest.raises(StorageError, match="cannot be reached"):
                await store.put(KEY, b"x", "image/png")
    assert calls == 3
    assert outcomes("failed") == failed + 1


async def test_wrong_credentials_are_refused_at_once(
    engine_settings: Callable[..., Settings],
) -> None:
    settings, refused = engine_settings(s3_secret_key="wrong-wrong-wrong"), outcomes("refused")
    async with connect_blobs(settings) as store:
        with pytest.raises(StorageError, match="SignatureDoesNotMatch"):
            await store.put(KEY, b"x", "image/png")
    assert outcomes("refused") == refused + 1


async def test_a_url_takes_a_file_without_a_key(
    engine_settings: Callable[..., Settings],
) -> None:
    key, data = "uploads/a/incoming-1", os.urandom(100_000)
    own = engine_settings().s3_endpoint_url
    for endpoint in ("", own.replace("127.0.0.1", "localhost")):
        settings = engine_settings(upload_endpoint_url=endpoint)
        async with connect_blobs(settings) as blobs, httpx.AsyncClient() as http:
            await blobs.prepare()
            await blobs.delete(key)
            url = await blobs.put_url(key, 60)
            assert url.startswith(endpoint or own)
            assert (await http.put(url.replace(key, f"{key}2"), content=data)).status_code == 403
            assert await blobs.stat(key) is None
            assert (await http.put(url, content=data)).status_code == 200
            info = await blobs.stat(key)
            assert info is not None
            assert info.size_bytes == len(data)
            assert await content(blobs, key) == data
