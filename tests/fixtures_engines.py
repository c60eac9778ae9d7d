"""Real NATS and S3 servers for tests, and the implementations that share contract tests."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from img2img_server.devstack import LocalServers
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.nats.connection import connect
from img2img_server.settings import Settings
from img2img_server.storage.interface import BlobStore
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.memory_blobs import MemoryBlobStore

QUEUE_LIMIT = 3
ACK_WAIT_SECONDS = 0.5

# Opens one more connection to NATS, as if from another process.
OpenBus = Callable[[], AbstractAsyncContextManager[Bus]]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalServers]:
    """Yields one nats-server and one S3 server for the whole test run."""
    async with LocalServers(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture
async def engine_settings(engines: LocalServers) -> Callable[..., Settings]:
    """Returns settings for the servers of the test run, with an empty NATS and a new bucket."""
    async with connect([engines.nats_url]) as link:
        for stream in await link.js.streams_info():
            await link.js.delete_stream(stream.config.name)
    base = {
        "nats_url": engines.nats_url,
        "s3_endpoint_url": engines.s3_endpoint_url,
        "s3_access_key": engines.s3_access_key,
        "s3_secret_key": engines.s3_secret_key,
        "s3_bucket": f"test-{uuid.uuid4()}",
    }

    def make(**changes: Any) -> Settings:
        return Settings(**(base | changes))

    return make


@pytest.fixture(params=["memory", "jetstream"])
def open_bus(request: pytest.FixtureRequest) -> OpenBus:
    """Yields connections to an empty bus with a queue limit of 3 and an ack_wait of half a
    second.
    """
    if request.param == "memory":
        shared = memory_bus(queue_limit=QUEUE_LIMIT, ack_wait_seconds=ACK_WAIT_SECONDS)

        @asynccontextmanager
        async def in_memory() -> AsyncIterator[Bus]:
            yield shared

        return in_memory
    settings = request.getfixturevalue("engine_settings")(
        queue_limit=QUEUE_LIMIT, ack_wait_seconds=ACK_WAIT_SECONDS
    )
    return lambda: connect_bus(settings)


@pytest.fixture
async def bus(open_bus: OpenBus) -> AsyncIterator[Bus]:
    """Yields one connection to an empty bus."""
    async with open_bus() as connected:
        yield connected


@pytest.fixture(params=["memory", "s3"])
def open_blobs(
    request: pytest.FixtureRequest,
) -> Callable[[], AbstractAsyncContextManager[BlobStore]]:
    """Connects to a store whose bucket does not exist yet."""
    if request.param == "memory":
        return lambda: nullcontext(MemoryBlobStore())
    settings = request.getfixturevalue("engine_settings")()
    return lambda: connect_blobs(settings)


@pytest.fixture
async def unprepared_blobs(
    open_blobs: Callable[[], AbstractAsyncContextManager[BlobStore]],
) -> AsyncIterator[BlobStore]:
    """Yields a store whose bucket does not exist yet."""
    async with open_blobs() as store:
        yield store


@pytest.fixture
async def blobs(unprepared_blobs: BlobStore) -> BlobStore:
    """Yields an empty store that is ready for files."""
    await unprepared_blobs.prepare()
    return unprepared_blobs


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """Returns a state folder for one test, for servers that it starts and kills."""
    return tmp_path / "state"
