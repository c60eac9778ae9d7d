"""The worker role without NATS or the bucket: it does not exit, reports the reason, and continues
later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_stack import free_port
from img2img_server.errors import UnavailableError
from img2img_server.exit_reason import reasons_of
from img2img_server.settings import Settings
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.worker import server as worker_server
from tests.fake_s3 import Answer, FakeS3, fake_s3
from tests.nats_servers import NatsServer, nats_configured
from tests.probes import readiness, until_ready_is
from tests.processes import Role

SECONDS = 60.0


@pytest.fixture
async def s3() -> AsyncIterator[FakeS3]:
    async with fake_s3() as store:
        yield store


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with nats_configured(tmp_path / "nats") as server:
        yield server


async def test_a_worker_says_why_it_is_not_ready_and_goes_on_by_itself(
    s3: FakeS3, nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()

    async def load(*_: Any) -> Any:
        return engine

    monkeypatch.setattr(worker_server, "_load_models", load)
    port, stop, started = free_port(), asyncio.Event(), asyncio.Event()
    settings = Settings(
        **s3.settings(nats_url=f"nats://{nats.address}", metrics_port=port, log_level="error")
    )
    stores: list[WatchedBlobs] = []

    class Kept(WatchedBlobs):
        """A WatchedBlobs that the test can reach: it adds itself to `stores`."""

        def __init__(self, blobs: Any, **options: Any) -> None:
            super().__init__(blobs, pauses_seconds=(0.05,), **options)
            stores.append(self)

    monkeypatch.setattr(worker_server, "WatchedBlobs", Kept)
    serving = asyncio.create_task(
        worker_server.serve_worker(settings, stop, lambda _: started.set())
    )
    async with asyncio.timeout(SECONDS):
        await started.wait()
    assert await readiness(port) == (200, "ready")

    s3.answers["PUT object"] = Answer(403, "SignatureDoesNotMatch")
    storing = asyncio.create_task(stores[0].put("temp/x", b"x", "text/plain"))
    await until_ready_is(port, 503, "IMG2IMG_S3_SECRET_KEY: the store at")
    s3.answers.clear()
    await storing
    await until_ready_is(port, 200, "ready")

    await nats.child.stop()
    await until_ready_is(port, 503, f"nothing listens at {nats.address}")
    assert not serving.done()
    await nats.child.start()
    await until_ready_is(port, 200, "ready")

    stop.set()
    await serving
    await asyncio.to_thread(engine.stop)


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_worker_waits_for_nats_that_went_away_while_its_model_was_loaded(
    comes_back: bool,
    s3: FakeS3,
    nats: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = FakeEngine()

    async def load(*_: Any) -> Any:
        await nats.child.stop()
        while "nats_disconnected" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return engine

    monkeypatch.setattr(worker_server, "_load_models", load)
    monkeypatch.setattr(worker_server, "RECONNECT_WAIT_SECONDS", 0.1)
    stop, started = asyncio.Event(), asyncio.Event()
    address = f"nats://{nats.address}"
    settings = Settings(
        **s3.settings(
            nats_url=address, metrics_port=0, startup_timeout_seconds=SECONDS if comes_back else 0.5
        )
    )
    serving = asyncio.create_task(
        worker_server.serve_worker(settings, stop, lambda _: started.set())
    )
    async with asyncio.timeout(SECONDS):
        if comes_back:
            while "nothing listens" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await nats.child.start()
            await started.wait()
            stop.set()
            await serving
        else:
            with pytest.raises(UnavailableError) as caught:
                await serving
            (reason,) = reasons_of(caught.value)
            assert reason.startswith(f"IMG2IMG_NATS_URL: nothing listens at {nats.address}")
    await asyncio.to_thread(engine.stop)


async def test_a_worker_with_a_wrong_secret_key_names_the_setting_in_its_last_line(
    nats: NatsServer, engine_settings: Any, tmp_path: Path
) -> None:
    config = engine_settings()
    worker = Role(
        "worker",
        {
            "IMG2IMG_NATS_URL": f"nats://{nats.address}",
            "IMG2IMG_S3_ENDPOINT_URL": config.s3_endpoint_url,
            "IMG2IMG_S3_ACCESS_KEY": config.s3_access_key.get_secret_value(),
            "IMG2IMG_S3_SECRET_KEY": "bad",
            "IMG2IMG_LOG_FORMAT": "console",
        },
        tmp_path / "worker.log",
    )
    await worker.launch()
    assert await worker.ended() == 2
    last = worker.log.read_text().splitlines()[-1]
    assert last.startswith("img2img-server worker: IMG2IMG_S3_SECRET_KEY: the store at 127.0.0.1:")
    assert "refused the signature (SignatureDoesNotMatch)" in last


async def test_a_role_that_waits_for_nats_ends_with_0_when_it_is_asked_to(tmp_path: Path) -> None:
    api = Role(
        "api",
        {
            "IMG2IMG_NATS_URL": f"nats://127.0.0.1:{free_port()}",
            "IMG2IMG_GRPC_PORT": "0",
            "IMG2IMG_DEV_KEY": "true",
        },
        tmp_path / "api.log",
    )
    await api.launch()
    async with asyncio.timeout(SECONDS * 3):
        while "nothing listens at" not in api.log.read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert await api.stop() == 0
    assert "stopped_before_ready" in api.log.read_text()
