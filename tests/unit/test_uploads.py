"""Uploads in one process: their budgets, and calls that change the same upload at one time."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

import pytest

from img2img_server import clock, errors
from img2img_server.api.uploads import PUT_SECONDS, Uploads
from img2img_server.budget import Budget
from img2img_server.domain.params import Limits
from img2img_server.errors import StorageError
from img2img_server.imaging.decoder import ThreadDecoder
from img2img_server.nats.uploads import MOST_UPLOADS, UploadRecord, UploadRecords
from img2img_server.storage.interface import BlobInfo
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.testing.memory_records import MemoryBucket
from tests.stack import photo, settings

IMAGE = photo(96, 64)
HASH = hashlib.sha256(IMAGE).hexdigest()
SIZE = len(IMAGE)
Hook = Callable[[], Awaitable[object]]


class Hooks:
    """Runs another call in the middle of a call, once."""

    def __init__(self) -> None:
        self._hooks: dict[str, Hook] = {}

    def at(self, method: str, hook: Hook) -> None:
        self._hooks[method] = hook

    async def run(self, method: str) -> None:
        if hook := self._hooks.pop(method, None):
            await hook()


class Blobs(MemoryBlobStore):
    def __init__(self, hooks: Hooks) -> None:
        super().__init__()
        self._hooks = hooks
        self.reads = 0

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        await self._hooks.run("before put")
        await super().put(key, data, media_type)
        await self._hooks.run("after put")

    async def stat(self, key: str) -> BlobInfo | None:
        await self._hooks.run("before stat")
        return await super().stat(key)

    async def read(self, key: str) -> AsyncIterator[bytes]:
        await self._hooks.run("before read")
        self.reads += 1
        async for chunk in super().read(key):
            yield chunk


class Records(MemoryBucket):
    def __init__(self, hooks: Hooks) -> None:
        super().__init__()
        self._hooks = hooks

    async def swap(self, key: str, value: bytes, revision: int) -> int:
        await self._hooks.run("before swap")
        return await super().swap(key, value, revision)


@dataclass
class Shop:
    """Two api processes with the same records and the same bucket."""

    a: Uploads
    b: Uploads
    records: UploadRecords
    blobs: Blobs
    hooks: Hooks
    budget: Budget  # of `a`

    @property
    def files(self) -> list[str]:
        return [key.removeprefix("uploads/t/") for key in self.blobs.stored_keys()]

    async def send(self, image: bytes = IMAGE) -> UploadRecord:
        """Announces an image and puts it where its URL leads."""
        sha256 = hashlib.sha256(image).hexdigest()
        upload, url, _ = await self.a.announce("t", sha256, len(image))
        await self.blobs.put(url.removeprefix("memory:///"), image, "")
        return upload


async def shop(most_bytes: int = 10 * SIZE, held: int = 2**20) -> Shop:
    hooks = Hooks()
    blobs, records = Blobs(hooks), UploadRecords(Records(hooks))
    await blobs.prepare()
    budget = Budget("downloaded bytes", held)
    config = settings(upload_bytes=most_bytes)
    a, b = (
        Uploads(config, records, blobs, ThreadDecoder(), Limits(), each)
        for each in (budget, Budget("downloaded bytes", held))
    )
    return Shop(a, b, records, blobs, hooks, budget)


async def test_simultaneous_checks_read_the_file_of_an_upload_once() -> None:
    made = await shop()
    upload = await made.send()
    found = await asyncio.gather(*(made.a.complete("t", upload.id) for _ in range(20)))
    assert all(each == found[0] and each.is_complete for each in found)
    assert made.blobs.reads == 1


async def test_a_check_holds_its_file_within_the_budget_of_downloaded_bytes() -> None:
    other = photo(96, 64, seed=2)
    made = await shop(held=SIZE + len(other) - 1)
    first, second = await made.send(), await made.send(other)

    async def check_another() -> None:
        assert made.budget.used("t") == SIZE
        with pytest.raises(errors.ServerBusyError):
            await made.a.complete("t", second.id)

    made.hooks.at("before read", check_another)
    assert (await made.a.complete("t", first.id)).is_complete
    assert made.budget.used() == 0
    assert (await made.a.complete("t", second.id)).is_complete


async def test_a_repeated_announcement_counts_with_its_own_size() -> None:
    made = await shop(most_bytes=1000)
    first, _, _ = await made.a.announce("t", "0" * 64, 10)
    await made.a.announce("t", "1" * 64, 900)
    with pytest.raises(errors.UploadsFullError):
        await made.a.announce("t", "0" * 64, 101)
    again, url, _ = await made.a.announce("t", "0" * 64, 100)
    assert (again.id, again.size_bytes) == (first.id, 100)
    assert url
    with pytest.raises(errors.UploadsFullError):
        await made.a.announce("t", "2" * 64, 1)


async def test_an_upload_has_the_size_of_its_file_whatever_was_announced() -> None:
    made = await shop()
    announced, _, _ = await made.a.announce("t", HASH, 1)
    upload = await made.a.create("t", IMAGE)
    assert (upload.id, upload.size_bytes, upload.is_complete) == (announced.id, SIZE, True)
    assert await made.a.content("t", upload.id, lambda _: None) == IMAGE

    full = await shop(most_bytes=SIZE)
    await full.a.announce("t", HASH, 1)
    await full.a.announce("t", "0" * 64, 1)
    with pytest.raises(errors.UploadsFullError):
        await full.a.create("t", IMAGE)
    assert full.files == []


@pytest.mark.parametrize("other_size", [1, SIZE])
async def test_an_announcement_cannot_shrink_an_upload_that_is_stored(other_size: int) -> None:
    made = await shop(most_bytes=2 * SIZE - 1)

    async def announce() -> None:
        await made.b.announce("t", HASH, 1)
        await made.b.announce("t", "0" * 64, other_size)

    made.hooks.at("before put", announce)
    if other_size == 1:
        assert (await made.a.create("t", IMAGE)).size_bytes == SIZE
    else:
        with pytest.raises(errors.UploadsFullError):
            await made.a.create("t", IMAGE)
        assert made.files == []
    assert sum(each.size_bytes for each in await made.records.all("t")) <= 2 * SIZE - 1


@pytest.mark.parametrize("fault", [StorageError("down"), asyncio.CancelledError()], ids=str)
async def test_a_call_that_fails_leaves_the_upload_that_another_has_completed(
    fault: BaseException,
) -> None:
    made = await shop()

    async def complete_and_fail() -> None:
        await made.b.create("t", IMAGE)
        raise fault

    made.hooks.at("before put", complete_and_fail)
    with pytest.raises((errors.UnavailableError, asyncio.CancelledError)):
        await made.a.create("t", IMAGE)
    assert (await made.a.get("t", f"sha256:{HASH}")).is_complete
    assert await made.a.content("t", f"sha256:{HASH}", lambda _: None) == IMAGE


async def test_an_announcement_leaves_the_upload_that_another_call_completes() -> None:
    made = await shop()
    upload = await made.send()
    made.hooks.at("before swap", lambda: made.b.complete("t", upload.id))
    found, url, _ = await made.a.announce("t", HASH, SIZE)
    assert (found.is_complete, url) == (True, "")
    assert (await made.a.get("t", upload.id)).is_complete


async def test_an_upload_that_is_deleted_during_its_check_stays_deleted() -> None:
    made = await shop()
    upload = await made.send()
    made.hooks.at("before put", lambda: made.b.delete("t", upload.id))
    with pytest.raises(errors.UploadNotFoundError):
        await made.a.complete("t", upload.id)
    assert list(await made.records.all("t")) == []
    assert made.files == []


@pytest.mark.parametrize("moment", ["before put", "after put"])
async def test_an_upload_that_is_deleted_while_it_is_created_is_created_again(moment: str) -> None:
    made = await shop()
    made.hooks.at(moment, lambda: made.b.delete("t", f"sha256:{HASH}"))
    upload = await made.a.create("t", IMAGE)
    assert list(await made.records.all("t")) == [upload]
    assert made.files == [HASH]


async def test_content_that_the_bucket_lost_can_be_announced_again() -> None:
    made = await shop()
    upload = await made.a.create("t", IMAGE)
    await made.blobs.delete(f"uploads/t/{HASH}")
    with pytest.raises(errors.UploadNotFoundError):
        await made.a.content("t", upload.id, lambda _: None)
    again, url, _ = await made.a.announce("t", HASH, SIZE)
    assert url
    assert not again.is_complete


async def test_a_file_of_another_size_leaves_the_record_of_the_upload() -> None:
    made = await shop()
    upload = await made.a.create("t", IMAGE)
    await made.blobs.put(f"uploads/t/{HASH}", IMAGE[:-1], "image/jpeg")
    with pytest.raises(errors.UploadNotFoundError):
        await made.a.content("t", upload.id, lambda _: None)
    assert await made.a.get("t", upload.id) == upload


@pytest.mark.parametrize("moment", ["before stat", "before read"])
async def test_a_job_uses_an_upload_that_another_api_completes_meanwhile(moment: str) -> None:
    made = await shop()
    upload = await made.send()
    made.hooks.at(moment, lambda: made.b.complete("t", upload.id))
    sizes: list[int] = []
    assert await made.a.content("t", upload.id, sizes.append) == IMAGE
    assert set(sizes) == {SIZE}
    assert (await made.a.complete("t", upload.id)).is_complete


async def test_expired_uploads_are_known_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    records, start, passed = UploadRecords(MemoryBucket()), clock.now(), 0.0
    monkeypatch.setattr(clock, "now", lambda: start + passed)
    new = UploadRecord(id="", sha256="", size_bytes=1, create_time=start, expire_time=0)
    for number in range(MOST_UPLOADS + 20):
        expire = clock.now() + PUT_SECONDS
        each = replace(new, id=f"{number}", sha256=f"{number}", expire_time=expire)
        await records.add("t", each, 2**20)
        if number % 100 == 99:
            passed += PUT_SECONDS + 1
    passed += PUT_SECONDS + 1
    live = replace(new, id="live", sha256="live", expire_time=clock.now() + 1)
    await records.add("t", live, 2**20)
    known = [each.id for each in await records.all("t")]
    assert len(known) == MOST_UPLOADS + 1
    assert known[-2:] == [str(MOST_UPLOADS + 19), "live"]
