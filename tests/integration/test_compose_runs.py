"""Runs the services of the Compose file as processes, prepared with the commands of its page."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from minio import Minio
from minio.error import S3Error

from img2img_client import AsyncClient
from img2img_server.nats.connection import connect
from tests.compose import copied, pods, services, starting_order
from tests.kubelet import POLL_SECONDS, Kubelet, RunningPod, cannot_run_pods
from tests.readme import ROOT, blocks

PAGE = ROOT / "docs" / "compose.md"
# NATS would read a password of digits as a number.
DIGITS = "20261130"
# Runs `docker compose run … api ARGUMENTS` without a container and records all calls.
DOCKER = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in
  "compose run --rm --no-deps -T api "*) shift 6; exec {server} "$@" ;;
esac
"""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Stack:
    """The running services."""

    kubelet: Kubelet
    environment: dict[str, str]
    api_key: str

    def __getitem__(self, name: str) -> RunningPod:
        return self.kubelet.pods[name]

    @property
    def gateway_url(self) -> str:
        return f"http://{self['gateway'].address}:8080"

    def bucket(self, secret_key: str) -> Minio:
        return Minio(
            f"{self['s3'].address}:{self.kubelet.ports[8333]}",
            access_key=self.environment["IMG2IMG_S3_ACCESS_KEY"],
            secret_key=secret_key,
            secure=False,
        )


async def prepare(folder: Path) -> str:
    """Runs the commands of the page. Returns the API key that they print."""
    [block] = [each for each in blocks(PAGE, "sh") if ".env.example" in each.text]
    docker = folder / "bin" / "docker"
    docker.parent.mkdir(parents=True)
    docker.write_text(DOCKER.format(server=f"{sys.executable} -m img2img_server"))
    docker.chmod(0o755)
    copied(folder / "deploy")
    calls = folder / "calls"
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", block.text),
        cwd=folder,
        env={**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}", "CALLS": str(calls)},
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    assert calls.read_text().splitlines()[-1] == "compose up --detach --wait"
    key = re.search(r"key \(shown only once\): (\S+)", said.decode())
    assert key, said.decode()
    return key[1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """Yields the services, once all health checks succeed and the model is announced."""
    if why := cannot_run_pods():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("compose")
    folder.chmod(0o755)
    key = await prepare(folder)
    deploy = folder / "deploy"
    env = (deploy / ".env").read_text()
    (deploy / ".env").write_text(re.sub(r"(?m)^(IMG2IMG_NATS_PASSWORD)=.*", rf"\1={DIGITS}", env))
    (deploy / "settings.env").write_text("IMG2IMG_WORKER_NAME=of-the-settings-file\n")
    found = await asyncio.to_thread(services, deploy)
    kubelet = Kubelet(await asyncio.to_thread(pods, deploy), folder)
    try:
        for group in starting_order(found):
            await asyncio.gather(*(start(kubelet.pods[name]) for name in group))
        async with AsyncClient(f"{kubelet.pods['api'].address}:50051", api_key=key) as client:
            async with asyncio.timeout(30):
                while not (await client.capabilities()).models:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(POLL_SECONDS)
        yield Stack(kubelet, found["worker"]["environment"], key)
    finally:
        await kubelet.stop()


async def start(pod: RunningPod) -> None:
    await pod.start()
    await pod.ready()


async def test_the_gateway_turns_an_image_into_another_that_the_bucket_keeps(stack: Stack) -> None:
    image = base64.b64encode((ROOT / "examples" / "cat.jpg").read_bytes()).decode()
    request = {"key": stack.api_key, "prompt": "an oil painting", "init_image": image, "seed": 1}
    request |= {"width": 256, "height": 256}
    url = f"{stack.gateway_url}/api/v6/realtime/img2img"
    async with aiohttp.ClientSession() as session:
        async with session.post(url, json=request) as response:
            answer = await response.json(content_type=None)
        assert answer["status"] == "success", answer
        (link,) = answer["output"]
        async with session.get(link) as got:
            content = await got.read()
    assert (got.status, content[:8]) == (200, b"\x89PNG\r\n\x1a\n")
    bucket = stack.bucket(stack.environment["IMG2IMG_S3_SECRET_KEY"])
    stored = await asyncio.to_thread(bucket.get_object, "img2img", link.split(":8080/")[1])
    with stored:
        assert stored.data == content


async def test_the_roles_read_the_settings_file(stack: Stack) -> None:
    async with AsyncClient(f"{stack['api'].address}:50051", api_key=stack.api_key) as client:
        photo = ROOT / "examples" / "cat.jpg"
        result = await client.generate("an oil painting", photo, width=256, height=256, seed=1)
    assert result.job.worker == "of-the-settings-file"
    # Over gRPC the base of links is the port that Compose publishes on loopback.
    assert result.images[0].url.startswith("http://127.0.0.1:8080/generations/")


async def test_nats_and_the_s3_server_refuse_other_credentials(stack: Stack) -> None:
    url = f"nats://img2img:{{}}@{stack['nats'].address}:4222"
    async with connect([url.format(DIGITS)]) as link:
        await link.js.account_info()
    with pytest.raises(Exception, match="refused the user"):
        async with connect([url.format("wrong")]):
            pass
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        await asyncio.to_thread(stack.bucket("wrong").list_buckets)


async def test_every_service_ends_in_its_time_with_status_0(stack: Stack) -> None:
    for names in (("gateway", "worker"), ("api",), ("nats", "s3")):
        ends = await asyncio.gather(*(stack[name].stop() for name in names))
        for name, (code, took) in zip(names, ends, strict=True):
            assert (name, code) == (name, 0), stack[name].log
            assert took < stack[name].grace_seconds
