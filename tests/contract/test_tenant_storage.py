"""Key-value buckets with the storage details of tenants, in memory and on JetStream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

import pytest

from img2img_server.nats import subjects
from img2img_server.nats.connection import connect
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket
from img2img_server.nats.tenant_settings import KeyValue, TenantStorage, kv_tenant_storage
from img2img_server.nats.topology import Bounds, prepare
from img2img_server.settings import Settings
from img2img_server.storage.vault import SealBrokenError, Vault, new_key
from img2img_server.testing.memory_records import MemoryBucket
from tests.unit.test_storage import GOOD

OTHER = replace(GOOD, image_directory="other", aws_secret_access_key="SK-OTHER")


@dataclass
class Buckets:
    """Two empty buckets, and a TenantStorage on them with any keys."""

    current: KeyValue
    retired: KeyValue

    def storage(self, keys: str) -> TenantStorage:
        return TenantStorage(Vault(keys), self.current, self.retired)

    async def everything(self) -> bytes:
        """Returns all stored values."""
        found = b""
        for bucket in (self.current, self.retired):
            for key in await bucket.keys():
                entry = await bucket.get(key)
                assert entry
                found += key.encode() + entry.value
        return found


OpenBuckets = Callable[[], AbstractAsyncContextManager[Buckets]]


@pytest.fixture(params=["memory", "jetstream"])
def open_buckets(request: pytest.FixtureRequest) -> OpenBuckets:
    if request.param == "memory":
        return lambda: nullcontext(Buckets(MemoryBucket(), MemoryBucket()))
    settings: Settings = request.getfixturevalue("engine_settings")()

    @asynccontextmanager
    async def on_jetstream() -> AsyncIterator[Buckets]:
        async with connect([settings.nats_url.get_secret_value()]) as link:
            await prepare(link, Bounds())
            yield Buckets(
                Bucket(link, subjects.STORAGE_BUCKET), Bucket(link, subjects.RETIRED_STORAGE_BUCKET)
            )

    return on_jetstream


@pytest.fixture
async def buckets(open_buckets: OpenBuckets) -> AsyncIterator[Buckets]:
    async with open_buckets() as empty:
        yield empty


async def test_a_bucket_swaps_only_what_is_as_it_was_read(buckets: Buckets) -> None:
    bucket = buckets.current
    assert await bucket.get("a.b") is None
    first = await bucket.swap("a.b", b"one", 0)
    with pytest.raises(WrongLastSequenceError):
        await bucket.swap("a.b", b"two", 0)
    second = await bucket.swap("a.b", b"two", first)
    with pytest.raises(WrongLastSequenceError):
        await bucket.swap("a.b", b"three", first)
    await bucket.put("a.c", b"x")
    await bucket.put("b.c", b"y")
    entry = await bucket.get("a.b")
    assert entry
    assert (entry.value, entry.revision) == (b"two", second)
    assert sorted(await bucket.keys()) == ["a.b", "a.c", "b.c"]
    assert sorted(await bucket.keys("a.*")) == ["a.b", "a.c"]
    await bucket.remove("a.b")
    await bucket.remove("never.there")
    assert await bucket.get("a.b") is None
    await bucket.swap("a.b", b"again", 0)


async def test_details_come_back_and_are_sealed_where_they_lie(buckets: Buckets) -> None:
    storage = buckets.storage(new_key())
    assert await storage.current("shop") is None
    version = await storage.put("shop", "realtime", GOOD)
    assert await storage.current("shop") == (version, GOOD)
    assert await storage.get("shop", version) == GOOD
    assert await storage.current("lab") is None
    assert await storage.get("lab", version) is None
    await storage.put("shop", "realtime", OTHER)
    there = await buckets.everything()
    for secret in (GOOD.aws_access_key_id, "SK-EXAMPLE", "SK-OTHER", "cdn.example.com"):
        assert secret.encode() not in there


async def test_a_version_that_was_replaced_or_reset_is_there_for_jobs_that_have_it(
    buckets: Buckets,
) -> None:
    storage = buckets.storage(new_key())
    first = await storage.put("shop", "realtime", GOOD)
    second = await storage.put("shop", "realtime", OTHER)
    assert await storage.current("shop") == (second, OTHER)
    assert await storage.get("shop", first) == GOOD
    await storage.remove("shop", "realtime")
    await storage.remove("shop", "realtime")
    assert await storage.current("shop") is None
    assert await storage.get("shop", second) == OTHER
    assert await storage.get("shop", "never") is None


async def test_another_server_type_is_kept_without_effect(buckets: Buckets) -> None:
    storage = buckets.storage(new_key())
    await storage.put("shop", "flux", GOOD)
    assert await storage.current("shop") is None
    version = await storage.put("shop", "realtime", OTHER)
    await storage.remove("shop", "flux")
    assert await storage.current("shop") == (version, OTHER)


async def test_after_a_rotation_the_old_key_is_not_needed(buckets: Buckets) -> None:
    old, new = new_key(), new_key()
    version = await buckets.storage(old).put("shop", "realtime", GOOD)
    with pytest.raises(SealBrokenError):
        await buckets.storage(new).current("shop")
    both = buckets.storage(f"{new},{old}")
    assert await both.current("shop") == (version, GOOD)
    await both.rotate()
    assert await buckets.storage(new).current("shop") == (version, GOOD)


async def test_a_rotation_leaves_what_no_key_opens(
    buckets: Buckets, caplog: pytest.LogCaptureFixture
) -> None:
    lost = buckets.storage(new_key())
    version = await lost.put("shop", "realtime", GOOD)
    await buckets.storage(new_key()).rotate()
    assert "storage_details_undecryptable: no key fits shop.realtime" in caplog.text
    await buckets.storage("").rotate()
    assert await lost.current("shop") == (version, GOOD)


async def test_a_server_without_keys_cannot_store(buckets: Buckets) -> None:
    assert not buckets.storage("").can_store
    assert buckets.storage(new_key()).can_store


async def test_every_connection_sees_the_same_details(
    engine_settings: Callable[..., Settings],
) -> None:
    keys = new_key()
    settings = engine_settings(storage_keys=keys)
    async with (
        connect([settings.nats_url.get_secret_value()]) as one,
        connect([settings.nats_url.get_secret_value()]) as two,
    ):
        await prepare(one, Bounds())
        version = await kv_tenant_storage(one, Vault(keys)).put("shop", "realtime", GOOD)
        assert await kv_tenant_storage(two, Vault(keys)).current("shop") == (version, GOOD)
