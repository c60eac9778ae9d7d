"""Readiness includes a write to NATS, and times come from the clock of NATS."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats.errors
import pytest

from benchmarks.local_stack import free_port
from img2img_server import clock
from img2img_server.nats import subjects, topology
from img2img_server.nats.bus import connect_bus
from img2img_server.nats.connection import NatsConnection, connect
from img2img_server.nats.probe import STORES_NOTHING, Probe
from img2img_server.settings import Settings
from tests.nats_servers import NatsServer, nats_configured
from tests.probes import readiness, until_ready_is
from tests.stack import read_until, running_api, running_worker, settings, spec

DAY = 86_400.0
FILL_BYTES = 1_000_000


@pytest.fixture
async def small_nats(tmp_path: Path) -> AsyncIterator[NatsServer]:
    """Yields a server whose streams may have 24 MB in all."""
    limited = f'max_payload: 8MB\njetstream {{ store_dir: "{tmp_path}/js", max_file_store: 24MB }}'
    async with nats_configured(tmp_path / "nats", limited, jetstream=False) as server:
        yield server


async def fill(link: NatsConnection) -> None:
    """Publishes until NATS refuses a message."""
    with suppress(nats.errors.Error):
        while True:
            await link.js.publish("fill", bytes(FILL_BYTES), timeout=2)


async def test_an_api_whose_nats_is_full_is_not_ready_until_nats_has_room(
    small_nats: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "DEAD_MAX_BYTES", 2**20)  # NATS reserves this storage.
    url, port = f"nats://{small_nats.address}", free_port()
    config = settings(nats_url=url, metrics_port=port, events_max_bytes=2**21)
    async with connect_bus(config) as bus, running_api(bus, config), connect([url]) as link:
        assert await readiness(port) == (200, "ready")
        await link.js.add_stream(name="FILL", subjects=["fill"])
        await fill(link)
        assert "IMG2IMG_NATS_URL: NATS stores nothing: " in await until_ready_is(port, 503)
        await link.js.delete_stream("FILL")
        await until_ready_is(port, 200)


async def test_a_nats_that_stores_nothing_is_reported_with_the_cure(
    engine_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """NATS stores nothing in a stream after a failed write. It sends no response to a publisher."""
    config = engine_settings()
    async with connect_bus(config), connect([config.nats_url.get_secret_value()]) as link:
        probe, publish = Probe(link), link.js.publish

        async def silent(*_: Any, **__: Any) -> None:
            raise TimeoutError

        monkeypatch.setattr(link.js, "publish", silent)
        await probe()
        await probe()
        assert probe.trouble == STORES_NOTHING
        assert caplog.text.count("restart nats-server") == 1
        monkeypatch.setattr(link.js, "publish", publish)
        await probe()
        assert probe.trouble == ""
        assert "nats_writable_again" in caplog.text


@pytest.mark.parametrize("days", [1.25, -1.25])
async def test_a_wrong_clock_changes_no_time_of_a_job_and_expires_none(
    days: float,
    engine_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = engine_settings()
    async with connect_bus(config) as right, running_worker(right), running_api(right) as api:
        earlier = await api.create(spec())
        await read_until(api.watch(earlier.name), "succeeded")
    wrong = clock.Clock(lambda: time.time() + days * DAY)
    monkeypatch.setattr(clock, "CLOCK", wrong)
    async with connect_bus(config) as bus, running_worker(bus), running_api(bus) as api:
        assert f"{abs(days) * DAY:.1f} s" in caplog.text
        assert (await api.get(earlier.name)).name == earlier.name
        began = time.time()
        log = await read_until(api.generate(spec()), "succeeded")
        ended = time.time()
        job = log[-1].event.succeeded.job
        times = [job.create_time, job.start_time, job.end_time, log[2].event.event_time]
        for each in times:
            assert began - 1 < each.ToMicroseconds() / 1e6 < ended + 1
        total = job.timings.total.ToMicroseconds() / 1e6
        assert 0 <= total <= ended - began + 0.1


async def test_the_probe_leaves_nothing_that_does_not_expire(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings()
    async with connect_bus(config), connect([config.nats_url.get_secret_value()]) as link:
        await Probe(link)()
        for stream in await link.js.streams_info():
            state = stream.state
            rates = subjects.bucket_stream(subjects.RATES_BUCKET)
            assert stream.config.name == rates or not state.messages
