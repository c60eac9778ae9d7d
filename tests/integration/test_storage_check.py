"""The connection check of update_s3, with a real S3 server, over HTTP and over gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from img2img.v1 import service_pb2
from img2img_server.devstack import LocalServers
from tests.integration.test_tenant_s3 import running_shops
from tests.stack import refusal

UPDATED = "S3 details updated successfully"


async def test_good_details_are_stored_and_the_file_of_the_check_is_gone(
    engines: LocalServers, tmp_path: Path
) -> None:
    async with running_shops(engines, tmp_path) as shops:
        answer = await shops.update(shops.a, check_connection="yes")
        reported = answer.json()
        assert (answer.status_code, reported["message"], reported["warning"]) == (200, UPDATED, "")
        assert shops.a.objects() == []
        assert await shops.bus.storage.current("a") is not None


async def test_links_that_do_not_work_are_a_warning(engines: LocalServers, tmp_path: Path) -> None:
    async with running_shops(engines, tmp_path) as shops:
        elsewhere = f"{engines.s3_endpoint_url}/no-such-bucket/"
        reported = (await shops.update(shops.a, check_connection=True, public_url=elsewhere)).json()
        assert reported["warning"] == "public_url does not serve the files"
        assert await shops.bus.storage.current("a") is not None
        reported = (await shops.update(shops.a, check_connection=True, deploy_type="video")).json()
        assert reported["warning"].startswith("deploy_type video is stored without effect")


BROKEN: list[tuple[dict[str, str], str, str]] = [
    ({"aws_access_key_id": "nobody"}, "aws_access_key_id", "is not known to the storage"),
    ({"aws_secret_access_key": "wrong"}, "aws_secret_access_key", "does not fit the access key"),
    (
        {"endpoint_url": "http://127.0.0.1:9"},
        "endpoint_url",
        "does not answer: no connection to 127.0.0.1: connection refused",
    ),
    (
        {"endpoint_url": "http://nowhere.invalid"},
        "endpoint_url",
        "does not answer: the name nowhere.invalid cannot be resolved",
    ),
]


@pytest.mark.parametrize(("wrong", "field", "why"), BROKEN, ids=lambda value: str(value)[:40])
async def test_what_the_storage_does_not_take_is_reported_and_not_stored(
    wrong: dict[str, str], field: str, why: str, engines: LocalServers, tmp_path: Path
) -> None:
    listed = "127.0.0.1, nowhere.invalid"
    async with running_shops(engines, tmp_path, outbound_allow=listed) as shops:
        answer = await shops.update(shops.a, check_connection=True, **wrong)
        sentence = f"{field} {why}"
        assert (answer.status_code, answer.json()["errors"]) == (400, {field: [sentence]})
        assert answer.json()["message"] == sentence.partition(":")[0]
        settings = service_pb2.StorageSettings(**(shops.a.details | wrong))
        request = service_pb2.UpdateStorageSettingsRequest(settings=settings, check_connection=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await shops.gateway.stack.api.stub.UpdateStorageSettings(
                request, metadata=[("authorization", f"Bearer {shops.a.key}")]
            )
        assert refusal(caught.value).violations == {field: sentence}
        assert await shops.bus.storage.current("a") is None


async def test_a_private_address_is_not_contacted(engines: LocalServers, tmp_path: Path) -> None:
    async with running_shops(engines, tmp_path, outbound_allow="files.internal") as shops:
        answer = await shops.update(shops.a, check_connection=True)
        assert answer.json()["message"] == "endpoint_url must be a public address"


@pytest.mark.parametrize("value", ["maybe", 2, [], {}])
async def test_a_flag_that_cannot_be_read_is_reported_with_all_else(
    value: Any, engines: LocalServers, tmp_path: Path
) -> None:
    sentence = "check_connection must be true or false"
    async with running_shops(engines, tmp_path) as shops:
        alone = await shops.update(shops.a, check_connection=value)
        assert (alone.status_code, alone.json()) == (
            400,
            {
                "status": "error",
                "message": sentence,
                "reason": "INVALID_REQUEST",
                "errors": {"check_connection": [sentence]},
            },
        )
        background_task = await shops.update(
            shops.a, check_connection=value, deploy_type="oven", region_name=None
        )
        assert background_task.json()["errors"] == {
            "deploy_type": ["deploy_type is invalid"],
            "region_name": ["region_name is required"],
            "check_connection": [sentence],
        }
        assert (await shops.update(shops.a, key="x", check_connection=value)).status_code == 401
        assert await shops.bus.storage.current("a") is None
