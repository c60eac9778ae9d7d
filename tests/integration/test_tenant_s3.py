"""Jobs whose files are stored in the tenant's own bucket, with a real S3 server over gRPC
and HTTP.
"""

from __future__ import annotations

import base64
import json
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from minio import Minio

from img2img_server.api.keys import KeyRing, new_key
from img2img_server.devstack import LocalServers
from img2img_server.errors import PermissionDeniedError, StorageError
from img2img_server.nats.bus import Bus
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.settings import Settings
from img2img_server.storage import tenant_s3
from img2img_server.storage.tenant_s3 import TenantS3
from img2img_server.storage.vault import new_key as new_storage_key
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.http_stack import Gateway, fetch_photo, gateway_before
from tests.stack import Stack, running_api, running_worker, settings
from tests.unit.test_storage import GOOD
from tests.web_peers import every_request, serving

PNG = b"\x89PNG\r\n\x1a\n"
UPDATE, RESET = "/api/v1/enterprise/update_s3", "/api/v1/enterprise/reset_s3"


@dataclass
class Shop:
    """A tenant: its key, and its bucket on the S3 server of the tests."""

    name: str
    key: str
    client: Minio
    endpoint: str
    details: dict[str, Any]

    @property
    def bucket(self) -> str:
        return str(self.details["bucket"])

    def objects(self) -> list[str]:
        found = self.client.list_objects(self.bucket, recursive=True)
        return [str(item.object_name) for item in found]


@dataclass
class Shops:
    """The service with two tenants that have the permission `storage`."""

    a: Shop
    b: Shop
    gateway: Gateway
    bus: Bus
    blobs: MemoryBlobStore
    engine: FakeEngine
    config: Settings = field(repr=False)

    async def update(self, shop: Shop, **changes: Any) -> Any:
        sent = {"key": shop.key, **shop.details, **changes}
        return await self.gateway.http.post(UPDATE, json=sent)


def bucket_of(engines: LocalServers, name: str) -> tuple[Minio, str]:
    """Returns a new bucket with public read access."""
    client = Minio(
        engines.s3_endpoint_url.removeprefix("http://"),
        access_key=engines.s3_access_key,
        secret_key=engines.s3_secret_key,
        secure=False,
        region="us-east-1",
    )
    bucket = f"{name}-{uuid.uuid4()}"
    client.make_bucket(bucket)
    public_read = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": "*",
                "Action": ["s3:GetObject"],
                "Resource": [f"arn:aws:s3:::{bucket}/*"],
            }
        ],
    }
    client.set_bucket_policy(bucket, json.dumps(public_read))
    return client, bucket


def shop(engines: LocalServers, name: str, key: str) -> Shop:
    client, bucket = bucket_of(engines, name)
    details = {
        "public_url": f"{engines.s3_endpoint_url}/{bucket}/",
        "region_name": "us-east-1",
        "endpoint_url": engines.s3_endpoint_url,
        "aws_access_key_id": engines.s3_access_key,
        "aws_secret_access_key": engines.s3_secret_key,
        "image_directory": f"{name} renders",
        "bucket": bucket,
    }
    return Shop(name, key, client, engines.s3_endpoint_url, details)


@asynccontextmanager
async def running_shops(
    engines: LocalServers, folder: Path, *, storage_keys: str | None = None, **changes: Any
) -> AsyncIterator[Shops]:
    key_a, entry_a = new_key("a", ["storage"])
    key_b, entry_b = new_key("b", ["storage"])
    file = folder / "keys.toml"
    file.write_text(f"{entry_a}\n{entry_b}\n")
    config = settings(**{"outbound_allow": "127.0.0.1", **changes})
    bus = memory_bus(storage_keys=new_storage_key() if storage_keys is None else storage_keys)
    engine = FakeEngine()
    async with (
        running_worker(bus, engine, config=config) as worker,
        running_api(bus, config, fetch=fetch_photo, keys=KeyRing(file, dev_key=False)) as api,
        gateway_before(Stack(bus, api, worker), legacy=bool(changes.get("legacy"))) as gateway,
    ):
        a, b = shop(engines, "a", key_a), shop(engines, "b", key_b)
        yield Shops(a, b, gateway, bus, worker.blobs, engine, config)


async def fetched(link: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(link) as answer:
        return answer.status, await answer.read()


def own(link: str) -> str:
    """Returns the key of a link in the service's own bucket."""
    return link.removeprefix("http://img.example.com/")


async def test_two_tenants_get_their_files_in_their_own_buckets(
    engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path) as shops:
        for each in (shops.a, shops.b):
            assert (await shops.update(each)).status_code == 200
            answer = (await shops.gateway.create(key=each.key, samples=2)).json()
            prefix = answer["meta"]["file_prefix"]
            names = [f"{each.name} renders/{prefix}-{index}.png" for index in range(2)]
            base = each.details["public_url"]
            assert answer["output"] == [f"{base}{quote(name)}" for name in names]
            assert (answer["status"], answer["warning"]) == ("success", "")
            assert sorted(each.objects()) == names
            for link, name in zip(answer["output"], names, strict=True):
                status, data = await fetched(link)
                assert (status, data[:8]) == (200, PNG)
                signed = each.client.presigned_get_object(each.bucket, name)
                assert await fetched(signed) == (200, data)
        assert shops.blobs._files == {}


async def test_future_links_are_the_later_output_and_dead_before(
    engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path) as shops:
        await shops.update(shops.a)
        sent = {"key": shops.a.key, "base64": True, "instant_response": True}
        job = (await shops.gateway.create(**sent)).json()
        (link,) = job["future_links"]
        await ended(shops.bus, job["id"])
        done = (await shops.gateway.fetch(job["id"], key=shops.a.key)).json()
        assert done["output"] == [link]
        assert link.endswith(".base64")
        status, text = await fetched(link)
        assert status == 200
        assert base64.b64decode(text, validate=True).startswith(PNG)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("a wrong secret", {"aws_secret_access_key": "wrong"}),
        ("a bucket that is not there", {"bucket": "nobody-made-this"}),
        ("no server listens", {"endpoint_url": "http://127.0.0.1:9"}),
    ],
)
async def test_a_store_that_does_not_take_the_file_leaves_it_with_us_and_warns(
    what: str,
    changes: dict[str, str],
    engines: LocalServers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tenant_s3, "FIRST_PAUSE_SECONDS", 0.001)
    allow = "127.0.0.0/8, localhost"
    async with running_shops(engines, tmp_path, outbound_allow=allow) as shops:
        assert (what, (await shops.update(shops.a, **changes)).status_code) == (what, 200)
        job = (await shops.gateway.create(key=shops.a.key)).json()
        link = job["output"][0]
        assert job["status"] == "success"
        assert link == f"http://img.example.com/generations/{job['meta']['file_prefix']}-0.png"
        assert job["warning"] == (
            "Your S3 storage did not take the files; this service keeps them for 24 hours."
        )
        assert (await shops.gateway.http.get(link)).content.startswith(PNG)
        assert list(shops.blobs._files) == [own(link)]
        again = (await shops.gateway.fetch(job["id"], key=shops.a.key)).json()
        assert again == job
        assert shops.a.objects() == []


@asynccontextmanager
async def front(engines: LocalServers, refuse: Callable[[web.Request], bool]) -> Any:
    """Yields the URL of a proxy in front of the S3 server, which rejects some requests, and the
    received requests.
    """
    seen: list[tuple[str, bool, int]] = []

    async def handle(request: web.Request) -> web.Response:
        body = await request.read()
        acl = "x-amz-acl" in request.headers
        if refuse(request):
            seen.append((request.path, acl, 400))
            text = "<Error><Code>AccessControlListNotSupported</Code></Error>"
            return web.Response(status=400, text=text, content_type="application/xml")
        url = f"{engines.s3_endpoint_url}{request.raw_path}"
        async with (
            aiohttp.ClientSession() as session,
            session.request(request.method, url, data=body, headers=request.headers) as answer,
        ):
            seen.append((request.path, acl, answer.status))
            return web.Response(status=answer.status, body=await answer.read())

    async with serving(every_request(handle)) as port:
        yield f"http://127.0.0.1:{port}", seen


async def test_a_bucket_without_acls_gets_the_file_without_one(
    engines: LocalServers, tmp_path: Path
) -> None:
    async with (
        front(engines, lambda request: "x-amz-acl" in request.headers) as (url, seen),
        running_shops(engines, tmp_path) as shops,
    ):
        await shops.update(shops.a, endpoint_url=url)
        job = (await shops.gateway.create(key=shops.a.key)).json()
        assert (job["status"], job["warning"]) == ("success", "")
        assert [(acl, status) for _, acl, status in seen] == [(True, 400), (False, 200)]
        assert (await fetched(job["output"][0]))[0] == 200


async def test_an_upload_is_tried_three_times(
    engines: LocalServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant_s3, "FIRST_PAUSE_SECONDS", 0.001)
    refused = 0

    def refuse(_: web.Request) -> bool:
        nonlocal refused
        refused += 1
        return refused <= 4  # two attempts, each with both forms of the request

    async with (
        front(engines, refuse) as (url, seen),
        running_shops(engines, tmp_path) as shops,
    ):
        await shops.update(shops.a, endpoint_url=url)
        job = (await shops.gateway.create(key=shops.a.key)).json()
        assert (job["status"], job["warning"]) == ("success", "")
        assert [status for _, _, status in seen] == [400, 400, 400, 400, 200]


async def test_temp_files_stay_with_us(engines: LocalServers, tmp_path: Path) -> None:
    async with running_shops(engines, tmp_path) as shops:
        await shops.update(shops.a)
        job = (await shops.gateway.create(key=shops.a.key, temp=True)).json()
        link = job["output"][0]
        assert link == f"http://img.example.com/temp/{job['meta']['file_prefix']}-0.png"
        assert (await shops.gateway.http.get(link)).status_code == 200
        assert shops.a.objects() == []


async def test_a_job_keeps_the_details_that_it_was_accepted_with(
    engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path) as shops:
        shops.engine._hold_after = 1
        links = []
        jobs = []
        for directory in ("first", "second"):
            await shops.update(shops.a, image_directory=directory)
            sent = {"key": shops.a.key, "instant_response": True}
            jobs.append((await shops.gateway.create(**sent)).json())
            links.append(jobs[-1]["future_links"][0])
        reset = await shops.gateway.http.post(RESET, json={"key": shops.a.key})
        assert reset.json() == {
            "status": "success",
            "message": "S3 details reset successfully",
            "deploy_type": "realtime",
        }
        shops.engine.release()
        for job, link in zip(jobs, links, strict=True):
            await ended(shops.bus, job["id"])
            done = (await shops.gateway.fetch(job["id"], key=shops.a.key)).json()
            assert (done["status"], done["output"]) == ("success", [link])
        folders = [name.split("/")[0] for name in sorted(shops.a.objects())]
        assert folders == ["first", "second"]
        after = (await shops.gateway.create(key=shops.a.key)).json()
        assert after["output"][0].startswith("http://img.example.com/generations/")


async def ended(bus: Bus, job_id: int) -> None:
    async with bus.events.watch(job_id) as log:
        async for entry in log:
            if entry.is_terminal:
                return


async def test_a_record_holds_no_secret(engines: LocalServers, tmp_path: Path) -> None:
    async with running_shops(engines, tmp_path) as shops:
        await shops.update(shops.a)
        job = (await shops.gateway.create(key=shops.a.key)).json()
        stored = await shops.bus.jobs.get("a", job["id"])
        assert engines.s3_secret_key not in repr(stored)
        assert engines.s3_access_key not in repr(stored)
        assert engines.s3_secret_key not in json.dumps(job)


@pytest.mark.parametrize("legacy", [False, True], ids=["today", "legacy"])
async def test_update_s3_answers_without_the_secrets(
    legacy: bool, engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path, legacy=legacy) as shops:
        answer = await shops.update(shops.a, deploy_type=None)
        reported = {
            "status": "success",
            "message": "S3 details updated successfully",
            "deploy_type": "realtime",
            "public_url": shops.a.details["public_url"],
            "image_directory": "a renders",
            "warning": "",
        }
        assert (answer.status_code, answer.json()) == (200, reported)
        answer = await shops.update(shops.a, deploy_type="flux")
        warning = "deploy_type flux is stored without effect: only realtime runs here"
        assert answer.json() == reported | {"deploy_type": "flux", "warning": warning}
        for _ in range(2):  # The call also succeeds if no details are stored.
            sent = {"key": shops.a.key, "deploy_type": "flux"}
            answer = await shops.gateway.http.post(RESET, json=sent)
            assert answer.json() == {
                "status": "success",
                "message": "S3 details reset successfully",
                "deploy_type": "flux",
            }


@pytest.mark.parametrize(
    ("changes", "errors"),
    [
        ({"public_url": None}, {"public_url": ["public_url is required"]}),
        ({"region_name": ""}, {"region_name": ["region_name is required"]}),
        ({"endpoint_url": "x"}, {"endpoint_url": ["endpoint_url must be a valid URL"]}),
        (
            {"endpoint_url": "http://169.254.169.254/"},
            {"endpoint_url": ["endpoint_url must be a public address"]},
        ),
        (
            {"endpoint_url": "http://0x7f.1:9000/"},
            {"endpoint_url": ["endpoint_url must be a public address"]},
        ),
        (
            {"endpoint_url": "https://s3.example.com:22/"},
            {"endpoint_url": ["endpoint_url must be a public address"]},
        ),
        ({"deploy_type": "toaster"}, {"deploy_type": ["deploy_type is invalid"]}),
        (
            {"deploy_type": 5, "bucket": ["x"], "image_directory": True, "region_name": "\ud800"},
            {
                "deploy_type": ["deploy_type is invalid"],
                "region_name": ["region_name must be a string"],
                "image_directory": ["image_directory must be a string"],
                "bucket": ["bucket must be a string"],
            },
        ),
    ],
)
async def test_wrong_details_are_refused_with_all_complaints(
    changes: dict[str, Any], errors: dict[str, list[str]], engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path) as shops:
        sent = json.dumps({"key": shops.a.key, **shops.a.details, **changes})
        answer = await shops.gateway.http.post(UPDATE, content=sent)
        reported = answer.json()
        assert (answer.status_code, reported["errors"]) == (400, errors)
        assert reported["message"] == next(iter(errors.values()))[0]
        assert await shops.bus.storage.current("a") is None


async def test_reset_s3_refuses_an_unknown_server_type(
    engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path) as shops:
        for value in ("toaster", 5, ["realtime"], True):
            sent = {"key": shops.a.key, "deploy_type": value}
            answer = await shops.gateway.http.post(RESET, json=sent)
            reported = (answer.status_code, answer.json()["message"])
            assert reported == (400, "deploy_type is invalid")


@pytest.mark.parametrize("path", [UPDATE, RESET])
async def test_the_key_is_reported_before_its_right_and_that_before_the_fields(
    path: str, engines: LocalServers, tmp_path: Path
) -> None:
    key, entry = new_key("c", [])
    file = tmp_path / "others.toml"
    file.write_text(entry)
    async with (
        running_shops(engines, tmp_path) as shops,
        running_api(shops.bus, keys=KeyRing(file, dev_key=False)) as api,
        gateway_before(shops.gateway.stack, address=api.address) as gateway,
    ):
        sent = {"key": "wrong", "deploy_type": 5}
        assert (await gateway.http.post(path, json=sent)).status_code == 401
        answer = await gateway.http.post(path, json={"key": key, "deploy_type": 5})
        reported = {
            "status": "error",
            "message": str(PermissionDeniedError("storage")),
            "reason": "PERMISSION_DENIED",
        }
        assert (answer.status_code, answer.json()) == (403, reported)


async def test_a_server_without_storage_keys_says_so(engines: LocalServers, tmp_path: Path) -> None:
    async with running_shops(engines, tmp_path, storage_keys="") as shops:
        answer = await shops.update(shops.a)
        assert (answer.status_code, answer.json()) == (
            503,
            {
                "status": "error",
                "message": "This server cannot keep S3 details: its operator must set "
                "IMG2IMG_STORAGE_KEYS",
                "reason": "STORAGE_KEYS_MISSING",
            },
        )


async def test_details_that_no_key_opens_any_more_leave_the_files_with_us(
    engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path) as shops:
        await shops.update(shops.a)
        shops.bus.storage._vault = memory_bus(storage_keys=new_storage_key()).storage._vault
        job = (await shops.gateway.create(key=shops.a.key)).json()
        assert job["status"] == "success"
        assert job["output"][0].startswith("http://img.example.com/generations/")
        assert job["warning"].startswith("Your S3 details cannot be read")


# the addresses to which the service connects


class Pointing(AbstractResolver):
    """A resolver that returns one address for every name: this machine's, until a test
    changes it.
    """

    address = "127.0.0.1"

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
        return [
            ResolveResult(
                hostname=host, host=self.address, port=port, family=family, proto=0, flags=0
            )
        ]

    async def close(self) -> None: ...


@asynccontextmanager
async def listener(answer: Callable[[], web.Response]) -> AsyncIterator[tuple[int, list[str]]]:
    """Yields the port of a server and the paths of the requests that it receives."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        await request.read()
        asked.append(request.path)
        return answer()

    async with serving(every_request(handle)) as port:
        yield port, asked


async def test_an_endpoint_that_comes_to_a_private_address_is_never_contacted() -> None:
    async with listener(web.Response) as (port, asked):
        details = replace(GOOD, endpoint_url=f"http://s3.example.com:{port}")
        store = TenantS3(OutboundPolicy(), Pointing())
        with pytest.raises(StorageError, match="forbidden address"):
            await store.put(details, "a.png", PNG, "image/png")
        assert asked == []
        # The request succeeds once the operator lists the host, so the policy had rejected it.
        store = TenantS3(OutboundPolicy.parse("s3.example.com"), Pointing())
        await store.put(details, "a.png", PNG, "image/png")
        assert asked == ["/renders/a.png"]


async def test_a_store_that_moves_to_a_private_address_during_a_check_keeps_its_file() -> None:
    names = Pointing()

    def taken() -> web.Response:
        names.address = "10.0.0.1"
        return web.Response()

    async with listener(taken) as (port, asked):
        details = replace(GOOD, endpoint_url=f"http://s3.example.com:{port}")
        store = TenantS3(OutboundPolicy.parse("127.0.0.1"), names)
        assert await store.check(details) == (None, "public_url does not serve the files")
        assert len(asked) == 1


@pytest.mark.parametrize(
    "host", ["bücher.example", "XN--BCHER-KVA.Example", "Bu\u0308cher.example."]
)
async def test_a_host_may_be_spelled_as_people_do(host: str, engines: LocalServers) -> None:
    client, bucket = bucket_of(engines, "idn")
    port = engines.s3_endpoint_url.rpartition(":")[2]
    base = f"http://{host}:{port}"
    details = replace(
        GOOD,
        endpoint_url=base,
        public_url=f"{base}/{bucket}/",
        bucket=bucket,
        aws_access_key_id=engines.s3_access_key,
        aws_secret_access_key=engines.s3_secret_key,
    )
    store = TenantS3(OutboundPolicy.parse("xn--bcher-kva.example"), Pointing())
    assert await store.check(details) == (None, "")
    # The check has removed its file.
    assert list(client.list_objects(bucket, recursive=True)) == []
    await store.put(details, "a.png", PNG, "image/png")
    link = details.file_link("a.png").replace(base, engines.s3_endpoint_url)
    assert await fetched(link) == (200, PNG)


async def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_s3, "FIRST_PAUSE_SECONDS", 0.001)
    async with listener(web.Response) as (target, silent):

        def away() -> web.Response:
            return web.Response(status=307, headers={"Location": f"http://127.0.0.1:{target}/x"})

        async with listener(away) as (port, asked):
            details = replace(GOOD, endpoint_url=f"http://127.0.0.1:{port}")
            store = TenantS3(OutboundPolicy.parse("127.0.0.1"))
            with pytest.raises(StorageError):
                await store.put(details, "a.png", PNG, "image/png")
        assert (asked, silent) == (["/renders/a.png"] * 3, [])
