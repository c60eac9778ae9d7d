"""Builds the image without a Docker engine and runs its roles: `make image-test`.

Needs root, 10 GB of disk and Debian's packages buildah, podman, runc and mmdebstrap; without them
it says so and ends with status 2. It proves the slim image; `--full` builds the other one
too (minutes: torch) and lets a worker from it do the job, instead of one from .venv. `--archive`
takes the slim image from a file of `make dist`.

The base is that of release/image.py. `--base-image` takes another one, the public one for example,
where a registry can be reached.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp

from benchmarks.local_stack import free_port
from img2img_client import AsyncClient
from img2img_server.devstack import LocalServers
from release import image
from release.commands import ROOT, run
from release.identity import VERSION
from release.image import buildah

STORE = list(map(str, image.STORE))
FORBIDDEN = ("gcc", "cc", "g++", "make", "pip", "pip3")  # programs that no final layer may contain
START_SECONDS = 180.0
# Roles run as Kubernetes would run them: no privileges, a read-only root. Limits are set because
# podman's defaults are above those of some machines.
PODMAN = (
    *("podman", *STORE, "--cgroup-manager=cgroupfs", "run", "--runtime=runc", "--rm"),
    *("--pull=never", "--network=host", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"),
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL"),
    "--security-opt=no-new-privileges",
)


def build(target: str, base: str) -> str:
    """Builds one target; returns its tag."""
    tag, began = f"localhost/img2img-service:test-{target}", time.monotonic()
    image.build(target, tag, VERSION.read(ROOT), base)
    print(f"built {target} in {time.monotonic() - began:.0f} s", flush=True)
    return tag


def inspect(tag: str, *, torch: bool) -> None:
    """Checks the promises of the Dockerfile."""
    template = (
        '{{.OCIv1.Config.User}} {{index .OCIv1.Config.Labels "org.opencontainers.image.title"}}'
    )
    assert buildah("inspect", "--format", template, tag) == "65532:65532 img2img-service"
    container = buildah("from", "--pull=never", tag)
    try:
        tree = Path(buildah("mount", container))
        binaries = [tree / folder / name for folder in BINARIES for name in FORBIDDEN]
        found = [str(path.relative_to(tree)) for path in binaries if path.exists()]
        assert not found, f"{tag} holds {found}"
        site = next((tree / "opt/img2img/lib").glob("python3.*/site-packages"))
        assert (site / "torch").exists() == torch
        assert list(site.glob("img2img_service-*.dist-info/METADATA")), "an SBOM would miss us"
        size = int(run("du", "-sxm", tree / "opt/img2img").split()[0])
        print(f"{tag}: {size} MB in /opt/img2img, torch: {torch}", flush=True)
    finally:
        buildah("umount", container)
        buildah("rm", container)


BINARIES = ("bin", "usr/bin", "usr/local/bin", "opt/img2img/bin")


class Container:
    """A role of the image."""

    def __init__(self, tag: str, role: str, environment: dict[str, str], *extra: str) -> None:
        self.role = role
        self._metrics_port = free_port()
        environment = {**environment, "IMG2IMG_METRICS_PORT": str(self._metrics_port)}
        self._name = f"img2img-test-{role}-{os.getpid()}"
        self._command = [
            *(*PODMAN, "--name", self._name),
            *(f"--env={name}={value}" for name, value in environment.items()),
            *(*extra, tag, role),
        ]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when the readiness probe succeeds."""
        self._process = await asyncio.create_subprocess_exec(*self._command)
        url = f"http://127.0.0.1:{self._metrics_port}/readyz"
        async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as session:
            while True:
                assert self._process.returncode is None, f"{self.role} ended"
                try:
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """Sends SIGTERM; the role must end with status 0."""
        assert self._process is not None
        command = ("podman", *STORE, "kill", "--signal=TERM", self._name)
        await asyncio.to_thread(run, *command)
        async with asyncio.timeout(40):
            assert await self._process.wait() == 0, f"{self.role} did not end cleanly"


@asynccontextmanager
async def running(container: Container) -> AsyncIterator[None]:
    await container.start()
    print(f"{container.role} is ready", flush=True)
    try:
        yield
    finally:
        await container.stop()
        print(f"{container.role} drained and ended with status 0", flush=True)


async def quickstart(slim: str, full: str | None) -> None:
    """Runs one job through api, gateway and worker; api and gateway from the slim image."""
    grpc_port, http_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        async with LocalServers(Path(folder)) as engines, AsyncExitStack() as stack:
            keys, key = make_key(slim, Path(folder))
            environment = {
                "IMG2IMG_GRPC_PORT": str(grpc_port),
                "IMG2IMG_HTTP_PORT": str(http_port),
                "IMG2IMG_API_ADDRESS": f"127.0.0.1:{grpc_port}",
                "IMG2IMG_API_KEYS_FILE": "/keys/keys.toml",
                "IMG2IMG_NATS_URL": engines.nats_url,
                "IMG2IMG_S3_ENDPOINT_URL": engines.s3_endpoint_url,
                "IMG2IMG_S3_ACCESS_KEY": engines.s3_access_key,
                "IMG2IMG_S3_SECRET_KEY": engines.s3_secret_key,
            }
            volume = f"--volume={keys.parent}:/keys:ro"
            await stack.enter_async_context(running(Container(slim, "api", environment, volume)))
            await stack.enter_async_context(running(Container(slim, "gateway", environment)))
            if full:
                worker = Container(full, "worker", environment, "--tmpfs=/tmp")
                await stack.enter_async_context(running(worker))
            else:
                await stack.enter_async_context(own_worker(environment))
            async with AsyncClient(f"127.0.0.1:{grpc_port}", api_key=key) as client:
                async with asyncio.timeout(START_SECONDS):  # until the worker is announced
                    while not (await client.capabilities()).models:  # noqa: ASYNC110
                        await asyncio.sleep(0.2)
                photo = ROOT / "examples" / "cat.jpg"
                result = await client.generate("an oil painting of a cat", photo, seed=1)
            async with aiohttp.ClientSession() as session:
                url = f"http://127.0.0.1:{http_port}"
                for path in ("/healthz", "/readyz", "/generations/" + result.images[0].url[-42:]):
                    async with session.get(url + path) as answer:
                        assert answer.status == 200, f"{path}: {answer.status}"
            print(f"one job in {result.job.timings.total_seconds:.1f} s by {result.job.worker}")


def make_key(tag: str, folder: Path) -> tuple[Path, str]:
    """Returns an API key that the image creates; the user of the image can read its file."""
    command = [*PODMAN, tag, "keys", "--tenant=test"]
    made = subprocess.run(command, check=True, text=True, capture_output=True)
    path = folder / "keys" / "keys.toml"
    path.parent.mkdir()
    path.write_text(made.stdout)
    folder.chmod(0o755)
    found = re.search(r"key \(shown only once\): (\S+)", made.stderr)
    assert found, made.stderr
    return path, found[1]


@asynccontextmanager
async def own_worker(environment: dict[str, str]) -> AsyncIterator[None]:
    """Runs a worker from .venv, if only the slim image is tested."""
    ours = {k: v for k, v in environment.items() if "KEYS_FILE" not in k}
    ours["IMG2IMG_METRICS_PORT"] = "0"
    command = [sys.executable, "-m", "img2img_server", "worker"]
    process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **ours})
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="build the image with torch, too")
    parser.add_argument("--base-image", default=image.BASE)
    parser.add_argument("--archive", type=Path, help="an OCI archive with the slim image")
    chosen = parser.parse_args()
    if reason := image.missing("podman", "runc"):
        print(f"image-test cannot run: {reason}", file=sys.stderr)
        return 2
    if chosen.base_image == image.BASE:
        image.make_base(new=False)
    if chosen.archive:
        tags = {"slim": image.pull(chosen.archive)}
    else:
        tags = {"slim": build("slim", chosen.base_image)}
    if chosen.full:
        tags["full"] = build("full", chosen.base_image)
    for target, tag in tags.items():
        inspect(tag, torch=target == "full")
    asyncio.run(quickstart(tags["slim"], tags.get("full")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
