"""Runs the pods of the rendered quickstart: a job from the gateway to S3, probes and drain."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from minio import Minio

from img2img_client import AsyncClient
from tests.chart_render import CHART, NAMESPACE, Object, render
from tests.kubelet import AS_ROOT, POLL_SECONDS, Kubelet, RunningPod, cannot_run_pods
from tests.pod_content import config
from tests.tiny_models import ZERO_SNR_V, write_sd

NAME = "demo-img2img"
ROLES = ("api", "gateway", "worker-default")
IMAGE = CHART / "files" / "cat.jpg"
# One more pool, which the last tests start.
FETCHED = (
    "workers.fetched.model.source=s3://img2img/models/tiny,workers.fetched.modelCache.type=emptyDir"
)
SMALL: dict[str, Any] = {"width": 256, "height": 256, "seed": 3, "strength": 0.5}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kubelet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kubelet]:
    """Yields every pod of the quickstart, once all are ready and the model is announced."""
    if why := cannot_run_pods():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("pods")
    folder.chmod(0o755)
    kubelet = Kubelet(render("quickstart", f"--set={FETCHED}"), folder)
    try:
        for names in (("nats", "s3"), ROLES):
            await asyncio.gather(*(start(pod(kubelet, name)) for name in names))
        async with client(kubelet) as caller:
            await until_served(caller, "atelier")
        yield kubelet
    finally:
        await kubelet.stop()


def pod(kubelet: Kubelet, name: str) -> RunningPod:
    return kubelet.pods[f"{NAME}-{name}"]


async def start(pod: RunningPod) -> None:
    await pod.start()
    await pod.ready()


async def post(kubelet: Kubelet, path: str, **fields: object) -> Object:
    """Sends one request to the gateway with the key that the chart created."""
    key = config(kubelet.objects, "Secret", f"{NAME}-quickstart")["api-key"].decode()
    url = f"http://{pod(kubelet, 'gateway').address}:8080{path}"
    body = json.dumps({"key": key, **fields})
    async with aiohttp.ClientSession() as session, session.post(url, data=body) as answer:
        return dict(await answer.json(content_type=None))


async def create(kubelet: Kubelet, **fields: object) -> Object:
    image = base64.b64encode(IMAGE.read_bytes()).decode()
    said = {"prompt": "an oil painting", "init_image": image, **SMALL, **fields}
    return await post(kubelet, "/api/v6/realtime/img2img", **said)


def bucket(kubelet: Kubelet) -> Minio:
    secret = config(kubelet.objects, "Secret", f"{NAME}-s3")
    return Minio(
        f"{pod(kubelet, 's3').address}:{kubelet.ports[8333]}",
        access_key=secret["access-key"].decode(),
        secret_key=secret["secret-key"].decode(),
        secure=False,
    )


async def test_one_job_goes_from_the_gateway_to_the_bucket(kubelet: Kubelet) -> None:
    answer = await create(kubelet)
    assert answer["status"] == "success", answer
    (link,) = answer["output"]
    async with aiohttp.ClientSession() as session, session.get(link) as got:
        image = await got.read()
    assert (got.status, image[:8]) == (200, b"\x89PNG\r\n\x1a\n")
    name = link.split(":8080/")[1]
    stored = await asyncio.to_thread(bucket(kubelet).get_object, "img2img", name)
    with stored:
        assert stored.data == image


async def test_helm_test_makes_an_image(kubelet: Kubelet) -> None:
    test = pod(kubelet, "test-job")
    await test.start()
    async with asyncio.timeout(60):
        assert await test.ended() == 0, test.log
    assert "image.png  256x256, seed 1" in test.log
    assert f"http://{NAME}-gateway.{NAMESPACE}.svc:8080/generations/" in test.log


async def test_the_roles_run_confined_and_find_their_files_where_the_chart_put_them(
    kubelet: Kubelet,
) -> None:
    for name in ROLES:
        role = pod(kubelet, name)
        mounted = role.read_only_mounts()
        assert (mounted["/"], mounted["/usr"], mounted["/tmp"]) == (True, True, False)
        expected = {each["mountPath"] for each in role.main["volumeMounts"]}
        assert expected <= set(mounted)
        if AS_ROOT:
            status = role.status()
            assert status["Uid"].split() == ["65532"] * 4
            assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
            assert status["NoNewPrivs"] == "1"


async def test_when_nats_stands_still_no_pod_is_ready_and_none_is_killed(
    kubelet: Kubelet,
) -> None:
    roles = [pod(kubelet, name) for name in ROLES]
    assert [await each.probe("readiness") for each in roles] == [True, True, True]
    pod(kubelet, "nats").signal(signal.SIGSTOP)
    try:
        await pod(kubelet, "api").until("readiness", False)
        await pod(kubelet, "gateway").until("readiness", False)
        assert [await each.probe("liveness") for each in roles] == [True, True, True]
    finally:
        pod(kubelet, "nats").signal(signal.SIGCONT)
    for each in roles:
        await each.until("readiness", True)


async def test_a_process_that_hangs_is_found_by_its_liveness_probe(kubelet: Kubelet) -> None:
    api = pod(kubelet, "api")
    api.signal(signal.SIGSTOP)
    try:
        assert not await api.probe("liveness")
    finally:
        api.signal(signal.SIGCONT)
    await api.until("liveness", True)


async def test_a_worker_that_is_stopped_finishes_its_job_within_its_grace_period(
    kubelet: Kubelet,
) -> None:
    worker = pod(kubelet, "worker-default")
    job = await create(kubelet, num_inference_steps=40, strength=1.0, instant_response=True)
    await until_running(kubelet, job["id"])
    (code, seconds), _ = await asyncio.gather(worker.stop(), worker.until("readiness", False))
    assert (code, seconds < worker.grace_seconds) == (0, True), worker.log
    answer = await post(kubelet, f"/api/v6/realtime/fetch/{job['id']}")
    assert answer["status"] == "success", answer


def client(kubelet: Kubelet) -> AsyncClient:
    """Yields a gRPC client of the api with the key that the chart created."""
    key = config(kubelet.objects, "Secret", f"{NAME}-quickstart")["api-key"].decode()
    return AsyncClient(f"{pod(kubelet, 'api').address}:50051", api_key=key)


async def until_served(caller: AsyncClient, model: str) -> None:
    """Returns when a worker has announced the model to the api, after the worker is ready."""
    async with asyncio.timeout(30):
        while model not in [  # noqa: ASYNC110 - another process
            each.name for each in (await caller.capabilities()).models
        ]:
            await asyncio.sleep(POLL_SECONDS)


async def until_running(kubelet: Kubelet, job_id: int) -> None:
    """Returns when a worker runs the job, by the events of the api."""
    key = config(kubelet.objects, "Secret", f"{NAME}-quickstart")["api-key"].decode()
    url = f"http://{pod(kubelet, 'gateway').address}:8080/v1/jobs/{job_id}/events"
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as events:
        async for line in events.content:
            if b"event: step" in line:
                return
    raise AssertionError("the job ended before it ran a step")


async def test_a_pool_whose_model_is_in_s3_fetches_it_and_works_with_it(
    kubelet: Kubelet, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    model = await asyncio.to_thread(write_sd, folder, tiny_vae=True, scheduler=ZERO_SNR_V)
    minio = bucket(kubelet)
    for file in (path for path in model.rglob("*") if path.is_file()):
        name = f"models/tiny/{file.relative_to(model)}"
        await asyncio.to_thread(minio.fput_object, "img2img", name, str(file))
    await start(pod(kubelet, "worker-fetched"))
    async with client(kubelet) as caller:
        await until_served(caller, "tiny")
        result = await caller.generate("an oil painting", IMAGE, model="tiny", **SMALL)
    assert (result.job.spec.model, result.job.worker) == ("tiny", f"{NAME}-worker-fetched-0")


async def test_api_and_gateway_that_are_stopped_end_in_time_with_status_0(
    kubelet: Kubelet,
) -> None:
    both = [pod(kubelet, name) for name in ("gateway", "api")]
    ends = await asyncio.gather(*(each.stop() for each in both))
    for stopped, (code, seconds) in zip(both, ends, strict=True):
        assert (code, seconds < stopped.grace_seconds) == (0, True), stopped.log
