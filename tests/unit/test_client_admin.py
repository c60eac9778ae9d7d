"""Managing a service through both clients and through the command."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

import img2img_client as api
from img2img.v1 import admin_service_pb2, service_pb2
from img2img_client import StorageSettings, StorageUpdate, SystemDetails
from img2img_client.cli.program import count
from tests import cli_runs
from tests.cli_runs import in_a_folder_with_a_photo
from tests.client_runs import BOTH, Run
from tests.fake_service import FakeService, Refusal

pytestmark = pytest.mark.usefixtures(in_a_folder_with_a_photo.__name__)
PUBLIC = {
    "public_url": "https://cdn.example.com/",
    "region_name": "eu-west-1",
    "endpoint_url": "https://my-bucket.s3.amazonaws.com",
    "image_directory": "renders",
}
KEYS = {"aws_access_key_id": "AK", "aws_secret_access_key": "SK"}
UPDATE = service_pb2.UpdateStorageSettingsRequest(
    settings=service_pb2.StorageSettings(**PUBLIC, **KEYS), check_connection=True
)


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


CALLS: list[tuple[str, tuple[Any, ...], Any, Any]] = [
    (
        "system_details",
        (),
        admin_service_pb2.GetSystemDetailsRequest(),
        SystemDetails(
            server_version="0.1.0",
            uptime_seconds=90.0,
            model_count=2,
            queued_jobs=3,
            queue_duration_seconds=4.5,
            gpu_usage=0.25,
        ),
    ),
    ("restart_server", (), admin_service_pb2.RestartServerRequest(), None),
    ("update_server", (), admin_service_pb2.UpdateServerRequest(), None),
    ("clear_cache", (), admin_service_pb2.ClearCacheRequest(), None),
    (
        "load_model",
        ("fast",),
        admin_service_pb2.LoadModelRequest(model="fast"),
        ("w1",),
    ),
    (
        "unload_model",
        ("fast", "w2"),
        admin_service_pb2.UnloadModelRequest(model="fast", worker="w2"),
        ("w1", "w2"),
    ),
    ("clear_queue", (), admin_service_pb2.ClearQueueRequest(), 3),
    ("reset_storage", (), service_pb2.ResetStorageSettingsRequest(), None),
    (
        "reset_storage",
        ("video",),
        service_pb2.ResetStorageSettingsRequest(deploy_type="video"),
        None,
    ),
]


@pytest.mark.parametrize(("name", "given", "sent", "returned"), CALLS, ids=lambda v: str(v)[:20])
def test_a_management_call_sends_its_request_and_returns_the_result(
    name: str, given: tuple[Any, ...], sent: Any, returned: Any, run: Run
) -> None:
    service = FakeService()
    found = run(service, lambda client: getattr(client.admin, name)(*given))
    # `run` makes a list of what a blocking call returns if that can be iterated over.
    assert (tuple(found) if isinstance(found, list) else found) == returned
    assert service.requests == [sent]
    assert service.keys == ["Bearer k"]


def test_storage_settings_are_sent_and_come_back_without_the_keys(run: Run) -> None:
    service, settings = FakeService(), StorageSettings(**PUBLIC, **KEYS)
    result = run(service, lambda c: c.admin.update_storage(settings, check_connection=True))
    assert result == StorageUpdate(settings=StorageSettings(**PUBLIC), warning="mind the gap")
    assert service.requests == [UPDATE]
    assert "AK" not in repr(settings)
    assert "SK" not in repr(settings)


def test_a_key_without_the_permission_raises_permission_denied(run: Run) -> None:
    refusal = Refusal(grpc.StatusCode.PERMISSION_DENIED, "no", "PERMISSION_DENIED")
    service = FakeService()
    service.refusals.append(refusal)
    with pytest.raises(api.PermissionDeniedError):
        run(service, lambda client: client.admin.restart_server())


@pytest.mark.parametrize(
    ("words", "sent", "shown", "as_json"),
    [
        (
            "admin details",
            admin_service_pb2.GetSystemDetailsRequest(),
            "version 0.1.0, up 90 s\n2 models\n3 queued jobs, about 4.5 s\n",
            {
                "server_version": "0.1.0",
                "uptime_seconds": 90.0,
                "model_count": 2,
                "queued_jobs": 3,
                "queue_duration_seconds": 4.5,
                "gpu_usage": 0.25,
            },
        ),
        (
            "admin keys",
            admin_service_pb2.ListKeysRequest(),
            "ab12: lab, not used lately\n"
            'web-2: shop, "the web shop", operate, expired 2026-01-01 00:00 UTC, '
            "last used 2025-12-31 23:59 UTC\n",
            {
                "keys": [
                    {
                        "id": "ab12",
                        "tenant": "lab",
                        "label": "",
                        "permissions": [],
                        "expire_time": None,
                        "has_expired": False,
                        "last_use_time": None,
                    },
                    {
                        "id": "web-2",
                        "tenant": "shop",
                        "label": "the web shop",
                        "permissions": ["operate"],
                        "expire_time": "2026-01-01T00:00:00Z",
                        "has_expired": True,
                        "last_use_time": "2025-12-31T23:59:00Z",
                    },
                ]
            },
        ),
        (
            "admin restart",
            admin_service_pb2.RestartServerRequest(),
            "the workers are restarting\n",
            {"done": True},
        ),
        (
            "admin update",
            admin_service_pb2.UpdateServerRequest(),
            "the workers are restarting and read their settings and models again\n",
            {"done": True},
        ),
        (
            "admin clear-cache",
            admin_service_pb2.ClearCacheRequest(),
            "the workers are emptying their caches\n",
            {"done": True},
        ),
        (
            "admin models load fast",
            admin_service_pb2.LoadModelRequest(model="fast"),
            "fast is loaded, or is being loaded, by w1\n",
            {"workers": ["w1"]},
        ),
        (
            "admin models unload fast --worker w2",
            admin_service_pb2.UnloadModelRequest(model="fast", worker="w2"),
            "fast is being unloaded by w1, w2\n",
            {"workers": ["w1", "w2"]},
        ),
        (
            "admin clear-queue",
            admin_service_pb2.ClearQueueRequest(),
            "3 queued jobs failed\n",
            {"cleared_jobs": 3},
        ),
        (
            "admin reset-storage",
            service_pb2.ResetStorageSettingsRequest(),
            "images of new jobs are stored by the service\n",
            {"done": True},
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_admin_command_sends_its_request_and_prints_the_result(
    words: str, sent: Any, shown: str, as_json: Any
) -> None:
    service = FakeService()
    result = cli_runs.run(service, *words.split())
    assert (result.exit_code, result.stdout, result.stderr) == (0, shown, "")
    assert json.loads(cli_runs.run(service, *words.split(), "--json").stdout) == as_json
    assert [request for request in service.requests if type(request) is type(sent)] == [sent] * 2


def test_the_gpu_usage_is_shown_only_with_a_gpu() -> None:
    result = cli_runs.run(FakeService(device="cuda:0 NVIDIA H200"), "admin", "details")
    assert result.stdout.splitlines()[1] == "2 models, GPUs 25% busy"


def test_a_count_of_one_has_no_plural() -> None:
    assert [count(number, "job") for number in (0, 1, 2)] == ["0 jobs", "1 job", "2 jobs"]


def test_set_storage_reads_the_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    words = "--public-url https://cdn.example.com/ --region eu-west-1 --directory renders --check"
    words += " --endpoint-url https://my-bucket.s3.amazonaws.com"
    service = FakeService()
    result = cli_runs.run(service, "admin", "set-storage", *words.split())
    assert (result.exit_code, result.stderr) == (0, "Warning: mind the gap\n")
    assert result.stdout == "images of new jobs are stored at https://my-bucket.s3.amazonaws.com\n"
    assert service.requests == [UPDATE]


def test_redeliver_sends_its_request() -> None:
    service = FakeService()
    result = cli_runs.run(service, "redeliver", "10000001")
    assert (result.exit_code, result.stdout) == (
        0,
        "jobs/10000001: the webhook will be sent again\n",
    )
    assert service.requests == [service_pb2.RedeliverWebhookRequest(name="jobs/10000001")]
