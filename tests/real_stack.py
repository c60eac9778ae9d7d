"""A fixture: the whole service as processes around a small model with random weights.

Its images have no meaning, but the code is the real one. Import `stack` and `worker` to use the
fixtures.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from receiver import SECRET

from benchmarks.local_stack import free_port
from img2img_client import AsyncClient
from img2img_server.devstack import LocalServers
from tests.processes import Role
from tests.tiny_models import ZERO_SNR_V, write_sd

PHOTO = Path(__file__).parents[1] / "examples" / "cat.jpg"
LONG: dict[str, Any] = {
    "width": 256,
    "height": 256,
    "strength": 1.0,
    "num_inference_steps": 40,
    "seed": 5,
    "output_format": "png",
}
SHORT: dict[str, Any] = {**LONG, "num_inference_steps": 4}


@dataclass
class RealStack:
    """The addresses of the running processes, and methods that start more of them."""

    folder: Path
    environment: dict[str, str]
    grpc_port: int
    http_url: str
    api: Role
    gateway: Role

    def role(self, name: str, **environment: str) -> Role:
        merged = {**self.environment, **environment}
        return Role(name, merged, self.folder / f"{name}-{free_port()}.log")

    def client(self) -> AsyncClient:
        return AsyncClient(f"127.0.0.1:{self.grpc_port}", api_key="dev-key")

    @asynccontextmanager
    async def worker(self, name: str, **environment: str) -> AsyncIterator[Role]:
        role = self.role("worker", IMG2IMG_WORKER_NAME=name, **environment)
        try:
            await role.start()
            yield role
        finally:
            await role.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealStack]:
    async with running_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@asynccontextmanager
async def running_stack(folder: Path, **changes: str) -> AsyncIterator[RealStack]:
    """Yields running servers, an api and a gateway. The caller starts workers. `changes`:
    settings.
    """
    model = write_sd(folder / "tiny", tiny_vae=True, scheduler=ZERO_SNR_V)
    grpc_port, http_port = free_port(), free_port()
    async with LocalServers(folder / "state") as engines, AsyncExitStack() as exits:
        environment = {
            "IMG2IMG_GRPC_PORT": str(grpc_port),
            "IMG2IMG_HTTP_PORT": str(http_port),
            "IMG2IMG_API_ADDRESS": f"127.0.0.1:{grpc_port}",
            "IMG2IMG_DEV_KEY": "true",
            "IMG2IMG_NATS_URL": engines.nats_url,
            "IMG2IMG_S3_ENDPOINT_URL": engines.s3_endpoint_url,
            "IMG2IMG_S3_ACCESS_KEY": engines.s3_access_key,
            "IMG2IMG_S3_SECRET_KEY": engines.s3_secret_key,
            "IMG2IMG_MODEL": str(model),
            "IMG2IMG_ACK_WAIT_SECONDS": "1.5",
            "IMG2IMG_DRAIN_SECONDS": "15",
            "IMG2IMG_OUTBOUND_ALLOW": "127.0.0.1",
            "IMG2IMG_WEBHOOK_SECRET": SECRET,
            "IMG2IMG_TORCH_THREADS": "1",
            **changes,
        }
        roles = {
            name: Role(name, environment, folder / f"{name}.log") for name in ("api", "gateway")
        }
        for role in roles.values():
            exits.push_async_callback(role.stop)
        await asyncio.gather(*(role.start() for role in roles.values()))
        yield RealStack(
            folder,
            environment,
            grpc_port,
            f"http://127.0.0.1:{http_port}",
            roles["api"],
            roles["gateway"],
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(stack: RealStack) -> AsyncIterator[Role]:
    async with stack.worker("first") as role:
        yield role
