"""Uploads over gRPC: stored once, named by jobs, limited, expired, and sent to the bucket."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import grpc
import pytest
import pytest_asyncio

from img2img.v1 import job_pb2, service_pb2, service_pb2_grpc
from img2img_client import AsyncClient, Client, InvalidArgumentError, NotFoundError, Upload
from img2img_server import clock
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.api.uploads import PUT_SECONDS
from img2img_server.nats import uploads as records
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.stack import (
    Refusal,
    photo,
    refusal,
    running_api,
    running_stack,
    running_worker,
    settings,
    spec,
    two_tenants,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
IMAGE = photo(96, 64)
BYTES = 100_000
TESTS = 100  # at least as many as there are in this module


@dataclass
class Caller:
    """Calls the api with one key."""

    stub: service_pb2_grpc.Img2ImgServiceStub
    key: str

    async def call(self, method: str, request: Any) -> Any:
        metadata = [("authorization", f"Bearer {self.key}")]
        return await getattr(self.stub, method)(request, metadata=metadata, timeout=20)

    async def store(self, image: bytes = IMAGE, **fields: Any) -> service_pb2.Upload:
        request = service_pb2.CreateUploadRequest(image=image, **fields)
        response = await self.call("CreateUpload", request)
        assert response.put_url == ""
        assert not response.HasField("put_expire_time")
        return response.upload

    async def announce(self, image: bytes = IMAGE, **changes: Any) -> Any:
        fields = {"sha256": hashlib.sha256(image).hexdigest(), "size_bytes": len(image)}
        return await self.call("CreateUpload", service_pb2.CreateUploadRequest(**fields | changes))

    async def complete(self, name: str) -> service_pb2.Upload:
        request = service_pb2.CompleteUploadRequest(name=name)
        return (await self.call("CompleteUpload", request)).upload

    async def get(self, name: str) -> service_pb2.Upload:
        return (await self.call("GetUpload", service_pb2.GetUploadRequest(name=name))).upload

    async def delete(self, name: str) -> None:
        await self.call("DeleteUpload", service_pb2.DeleteUploadRequest(name=name))

    async def job(self, upload: str, **changes: Any) -> job_pb2.Job:
        wanted = spec(init_image=job_pb2.InitImage(upload=upload), **changes)
        response = await self.call("CreateJob", service_pb2.CreateJobRequest(spec=wanted))
        return response.job


@dataclass
class Shop:
    """Two tenants of one service that have stored nothing. `name`: that of tenant `a`."""

    a: Caller
    b: Caller
    name: str
    blobs: MemoryBlobStore

    def files(self) -> list[str]:
        """Returns the files of tenant `a` without their folder."""
        folder = f"uploads/{self.name}/"
        keys = self.blobs.stored_keys()
        return [key.removeprefix(folder) for key in keys if key.startswith(folder)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shops(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Iterator[Shop]]:
    """Yields pairs of tenants of one service, a new pair for each test."""
    made = [(f"t{number}", *new_key(f"t{number}", [])) for number in range(2 * TESTS)]
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text("\n".join(entry for _, _, entry in made))
    bus, config = memory_bus(), settings(upload_bytes=BYTES)
    ring = KeyRing(file, dev_key=False)
    async with (
        running_worker(bus) as worker,
        running_api(bus, config, keys=ring, blobs=worker.blobs) as api,
    ):
        callers = [(name, Caller(api.stub, key)) for name, key, _ in made]
        yield (
            Shop(a, b, name, worker.blobs)
            for (name, a), (_, b) in zip(callers[::2], callers[1::2], strict=True)
        )


@pytest.fixture
def shop(shops: Iterator[Shop]) -> Shop:
    return next(shops)


@contextmanager
def refused(found: list[Refusal]) -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    found.append(refusal(caught.value))


async def reason_of(call: Any) -> str:
    found: list[Refusal] = []
    with refused(found):
        await call
    return f"{found[0].code.name} {found[0].reason}"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Returns a function that moves the clock forward."""
    now, passed = clock.now, 0.0
    monkeypatch.setattr(clock, "now", lambda: now() + passed)

    def move(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    return move


async def test_jobs_name_an_upload_by_name_id_and_hash(shop: Shop) -> None:
    upload = await shop.a.store()
    assert upload.sha256 == hashlib.sha256(IMAGE).hexdigest()
    assert (upload.size_bytes, upload.media_type) == (len(IMAGE), "image/jpeg")
    assert upload.complete
    assert upload.expire_time.seconds - upload.create_time.seconds == 24 * 3600
    direct = spec(init_image=job_pb2.InitImage(data=IMAGE))
    direct.ClearField("width")
    direct.ClearField("height")
    sent = (await shop.a.call("CreateJob", service_pb2.CreateJobRequest(spec=direct))).job
    names = [upload.name, upload.name.removeprefix("uploads/"), f"sha256:{upload.sha256.upper()}"]
    for name in names:
        request = spec(init_image=job_pb2.InitImage(upload=name))
        request.ClearField("width")
        request.ClearField("height")
        job = (await shop.a.call("CreateJob", service_pb2.CreateJobRequest(spec=request))).job
        # The size follows the aspect ratio of the init image.
        assert (job.spec.width, job.spec.height) == (sent.spec.width, sent.spec.height)
        assert job.spec.width > job.spec.height


async def test_the_job_of_an_upload_gives_the_image_of_the_same_file(shop: Shop) -> None:
    upload = await shop.a.store()

    async def image_of(source: job_pb2.InitImage) -> str:
        request = service_pb2.GenerateRequest(spec=spec(init_image=source))
        metadata = [("authorization", f"Bearer {shop.a.key}")]
        digests = [
            response.event.sample_finished.image.sha256
            async for response in shop.a.stub.Generate(request, metadata=metadata, timeout=20)
            if response.event.HasField("sample_finished")
        ]
        [digest] = digests
        return digest

    by_upload = await image_of(job_pb2.InitImage(upload=upload.name))
    assert by_upload == await image_of(job_pb2.InitImage(data=IMAGE))
    assert by_upload != await image_of(job_pb2.InitImage(data=photo(96, 64, seed=2)))


async def test_the_same_content_is_one_upload_and_one_file(
    shop: Shop, later: Callable[[float], None]
) -> None:
    first = await shop.a.store()
    later(3600)
    second = await shop.a.store()
    assert second.name == first.name
    assert second.expire_time.seconds >= first.expire_time.seconds + 3600
    assert shop.files() == [first.sha256]
    assert (await shop.a.announce()).upload == second
    other = await shop.a.store(photo(96, 64, seed=3))
    assert other.name != first.name
    assert len(shop.files()) == 2


async def test_simultaneous_uploads_of_the_same_content_are_one(shop: Shop) -> None:
    found = await asyncio.gather(*(shop.a.store() for _ in range(5)))
    assert len({upload.name for upload in found}) == 1
    assert len(shop.files()) == 1


async def test_another_tenant_finds_no_upload(shop: Shop) -> None:
    upload = await shop.a.store()
    for name in (upload.name, upload.name.removeprefix("uploads/"), f"sha256:{upload.sha256}"):
        assert await reason_of(shop.b.get(name)) == "NOT_FOUND UPLOAD_NOT_FOUND"
        assert await reason_of(shop.b.job(name)) == "NOT_FOUND UPLOAD_NOT_FOUND"
        assert await reason_of(shop.b.complete(name)) == "NOT_FOUND UPLOAD_NOT_FOUND"
        assert await reason_of(shop.b.delete(name)) == "NOT_FOUND UPLOAD_NOT_FOUND"
    # The other tenant has to send the content, too.
    assert (await shop.b.announce()).put_url
    own = await shop.b.store()
    assert own.name != upload.name
    assert (await shop.a.get(upload.name)) == upload


@pytest.mark.parametrize("name", ["", "uploads/", "uploads/nope", "sha256:", "sha256:00", "../a"])
async def test_unknown_names_are_not_found(name: str, shop: Shop) -> None:
    await shop.a.store()
    assert await reason_of(shop.a.get(name)) == "NOT_FOUND UPLOAD_NOT_FOUND"
    expected = "NOT_FOUND UPLOAD_NOT_FOUND" if name else "INVALID_ARGUMENT INVALID_REQUEST"
    assert await reason_of(shop.a.job(name)) == expected


async def test_an_expired_upload_is_refused_with_its_reason(
    shop: Shop, later: Callable[[float], None]
) -> None:
    upload = await shop.a.store()
    later(24 * 3600 - 60)
    await shop.a.job(upload.name)
    later(61)
    for call in (shop.a.get, shop.a.job, shop.a.complete):
        assert await reason_of(call(upload.name)) == "NOT_FOUND UPLOAD_EXPIRED"
    assert await reason_of(shop.a.job(f"sha256:{upload.sha256}")) == "NOT_FOUND UPLOAD_EXPIRED"
    again = await shop.a.store()
    assert again.name != upload.name
    await shop.a.job(f"sha256:{upload.sha256}")
    later(records.EXPIRED_SECONDS)
    await shop.a.store(photo(96, 64, seed=4))  # Old records are removed with the next change.
    assert await reason_of(shop.a.get(upload.name)) == "NOT_FOUND UPLOAD_NOT_FOUND"


async def test_a_deleted_upload_is_gone_with_its_file(shop: Shop) -> None:
    upload = await shop.a.store()
    job = await shop.a.job(upload.name)
    await shop.a.delete(upload.name)
    assert shop.files() == []
    assert await reason_of(shop.a.get(upload.name)) == "NOT_FOUND UPLOAD_NOT_FOUND"
    assert await reason_of(shop.a.delete(upload.name)) == "NOT_FOUND UPLOAD_NOT_FOUND"
    metadata = [("authorization", f"Bearer {shop.a.key}")]
    watched = service_pb2.WatchJobRequest(name=job.name)
    kinds = [
        e.event.WhichOneof("event") async for e in shop.a.stub.WatchJob(watched, metadata=metadata)
    ]
    assert kinds[-1] == "succeeded", "an accepted job keeps its init image"


async def test_uploads_count_into_the_budget_of_their_tenant(
    shop: Shop, later: Callable[[float], None]
) -> None:
    images = [photo(512, 512, seed=seed) for seed in range(20)]
    most = BYTES // max(map(len, images))
    assert 1 <= most < len(images) - 2
    stored = [await shop.a.store(image) for image in images[:most]]
    later(60)
    found: list[Refusal] = []
    with refused(found):
        while True:
            stored.append(await shop.a.store(images[len(stored)]))
    assert (found[0].code.name, found[0].reason) == ("RESOURCE_EXHAUSTED", "UPLOADS_FULL")
    assert found[0].metadata == {"most_bytes": str(BYTES), "most_uploads": "1000"}
    assert 24 * 3600 - 120 < (found[0].retry_seconds or 0) <= 24 * 3600 - 60
    assert sum(upload.size_bytes for upload in stored) <= BYTES
    assert len(shop.files()) == len(stored), "the file that was refused is not stored"
    assert await reason_of(shop.a.announce(images[-1])) == "RESOURCE_EXHAUSTED UPLOADS_FULL"
    await shop.b.store(images[-1])  # Another tenant has a budget of its own.
    await shop.a.delete(stored[0].name)
    await shop.a.store(images[-1])


async def test_files_that_jobs_cannot_use_are_refused(shop: Shop) -> None:
    for image, reason in ((b"GIF89a", "INVALID_IMAGE"), (IMAGE[:-300], "INVALID_IMAGE")):
        found: list[Refusal] = []
        with refused(found):
            await shop.a.store(image)
        assert (found[0].code.name, found[0].reasons) == ("INVALID_ARGUMENT", {"image": reason})
        assert found[0].violations["image"].startswith("image is not a valid PNG, JPEG or WebP")
    found = []
    with refused(found):
        await shop.a.store(IMAGE, sha256="0" * 64)
    assert found[0].reasons == {"sha256": "INVALID_FORMAT"}
    found = []
    with refused(found):
        await shop.a.store(IMAGE, size_bytes=7)
    assert found[0].reasons == {"size_bytes": "INVALID_FORMAT"}
    assert shop.files() == []


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"sha256": ""}, {"sha256": "REQUIRED"}),
        ({"sha256": "0" * 63}, {"sha256": "INVALID_FORMAT"}),
        ({"size_bytes": 0}, {"size_bytes": "OUT_OF_RANGE"}),
        ({"size_bytes": 20_971_521}, {"size_bytes": "OUT_OF_RANGE"}),
        (
            {"sha256": "x", "size_bytes": -1},
            {"sha256": "INVALID_FORMAT", "size_bytes": "OUT_OF_RANGE"},
        ),
    ],
    ids=str,
)
async def test_wrong_announcements_are_refused(
    changes: dict[str, Any], reasons: dict[str, str], shop: Shop
) -> None:
    found: list[Refusal] = []
    with refused(found):
        await shop.a.announce(**changes)
    assert found[0].reasons == reasons


async def sent(shop: Shop, response: Any, content: bytes) -> None:
    """Puts the content where the URL of the response leads, as an S3 server does."""
    await shop.blobs.put(response.put_url.removeprefix("memory:///"), content, "image/jpeg")


@pytest.mark.parametrize("first_use", ["CompleteUpload", "CreateJob"])
async def test_a_file_that_was_sent_to_the_bucket_is_checked_by_its_first_use(
    first_use: str, shop: Shop
) -> None:
    response = await shop.a.announce()
    upload = response.upload
    assert (upload.complete, upload.media_type) == (False, "")
    assert response.put_expire_time == upload.expire_time
    assert upload.expire_time.seconds - upload.create_time.seconds == PUT_SECONDS
    for call in (shop.a.complete, shop.a.job):
        assert await reason_of(call(upload.name)) == "FAILED_PRECONDITION UPLOAD_INCOMPLETE"
    await sent(shop, response, IMAGE)
    if first_use == "CreateJob":
        await shop.a.job(f"sha256:{upload.sha256}")
    complete = await shop.a.complete(upload.name)
    assert (complete.name, complete.complete, complete.media_type) == (
        *(upload.name, True),
        "image/jpeg",
    )
    assert complete.expire_time.seconds - complete.create_time.seconds >= 24 * 3600
    assert shop.files() == [upload.sha256]
    # The URL can be used again, but the upload keeps the file that was checked.
    await sent(shop, response, photo(96, 64, seed=9))
    await shop.a.job(upload.name)
    assert (await shop.a.get(upload.name)) == complete


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (IMAGE + b"\0", {"size_bytes": "INVALID_FORMAT"}),
        (bytes(len(IMAGE)), {"sha256": "INVALID_FORMAT"}),
    ],
    ids=["another size", "another hash"],
)
async def test_another_file_than_announced_is_refused_and_deleted(
    content: bytes, reasons: dict[str, str], shop: Shop
) -> None:
    response = await shop.a.announce()
    await sent(shop, response, content)
    for call in (shop.a.complete, shop.a.job):
        await sent(shop, response, content)
        found: list[Refusal] = []
        with refused(found):
            await call(response.upload.name)
        assert found[0].reasons == reasons
        assert shop.files() == []
    await sent(shop, response, IMAGE)  # The right file can still be sent.
    assert (await shop.a.complete(response.upload.name)).complete


async def test_a_file_that_is_no_image_is_refused_after_its_transfer(shop: Shop) -> None:
    content = b"GIF89a" * 20
    response = await shop.a.announce(content)
    await sent(shop, response, content)
    found: list[Refusal] = []
    with refused(found):
        await shop.a.complete(response.upload.name)
    assert found[0].reasons == {"image": "INVALID_IMAGE"}
    assert shop.files() == []


async def test_a_url_that_was_not_used_expires_and_frees_its_bytes(
    shop: Shop, later: Callable[[float], None]
) -> None:
    big = {"size_bytes": BYTES - 10}
    response = await shop.a.announce(**big)
    assert await reason_of(shop.a.announce(photo(96, 64, seed=7))) == (
        "RESOURCE_EXHAUSTED UPLOADS_FULL"
    )
    again = await shop.a.announce(**big)  # The announcement can be repeated.
    assert again.upload.name == response.upload.name
    later(PUT_SECONDS + 1)
    assert await reason_of(shop.a.complete(response.upload.name)) == "NOT_FOUND UPLOAD_EXPIRED"
    await shop.a.announce(photo(96, 64, seed=7))


async def test_a_file_that_the_bucket_lost_is_not_found(shop: Shop) -> None:
    upload = await shop.a.store()
    await shop.blobs.delete(f"uploads/{shop.name}/{upload.sha256}")
    assert await reason_of(shop.a.job(upload.name)) == "NOT_FOUND UPLOAD_NOT_FOUND"


async def test_without_the_setting_no_uploads_are_taken() -> None:
    async with running_stack() as stack:
        caller = Caller(stack.api.stub, "dev-key")
        for call in (caller.store(), caller.announce(), caller.get("a"), caller.job("a")):
            assert await reason_of(call) == "FAILED_PRECONDITION UPLOADS_DISABLED"


async def test_a_bucket_that_cannot_be_used_leaves_no_upload(tmp_path: Path) -> None:
    ring, key_a, _ = two_tenants(tmp_path)
    bus, blobs = memory_bus(), MemoryBlobStore()  # not prepared, so it refuses files
    config = settings(upload_bytes=BYTES)
    async with running_api(bus, config, keys=ring, blobs=blobs) as api:
        caller = Caller(api.stub, key_a)
        assert await reason_of(caller.store()) == "UNAVAILABLE UNAVAILABLE"
        assert list(await bus.uploads.all("a")) == []
        await blobs.prepare()
        await caller.store()


async def test_the_clients_use_an_upload_for_several_jobs(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(IMAGE)
    options = {"width": 256, "height": 256, "seed": 1}
    async with running_stack(api_config=settings(upload_bytes=BYTES)) as stack:
        async with AsyncClient(stack.api.address, api_key="dev-key") as client:
            upload = await client.upload(path)
            assert (upload.sha256, upload.size_bytes) == (
                *(hashlib.sha256(IMAGE).hexdigest(), len(IMAGE)),
            )
            assert await client.upload(IMAGE) == replace(upload, expire_time=ANY)
            direct = await client.generate("a", path, **options)
            for _ in range(2):
                result = await client.generate("a", upload, **options)
                assert result.images[0].data == direct.images[0].data
        await asyncio.to_thread(blocking_calls, stack.api.address, upload)


def blocking_calls(address: str, upload: Upload) -> None:
    """Makes the calls of the blocking client."""
    with Client(address, api_key="dev-key") as client:
        kinds = [type(event).__name__ for event in client.stream("a", upload)]
        assert kinds[-1] == "Succeeded"
        for source in (upload, "https://example.org/a.png"):
            with pytest.raises(InvalidArgumentError, match="cannot be uploaded"):
                client.upload(source)
        client.delete_upload(upload)
        with pytest.raises(NotFoundError) as gone:
            client.create("a", upload)
        assert gone.value.reason == "UPLOAD_NOT_FOUND"
