"""Every role measures how late its event loop runs."""

from __future__ import annotations

import asyncio
import time

import aiohttp

from img2img_server.telemetry import LAG_INTERVAL_SECONDS, probe_server
from tests.stack import settings

NAME = "img2img_event_loop_lag_seconds"
BLOCKED_SECONDS = 0.5


async def measured(session: aiohttp.ClientSession, address: str) -> tuple[float, float]:
    """Returns the number of measurements and the sum of the lag."""
    async with session.get(f"http://{address}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return float(values[f"{NAME}_count"]), float(values[f"{NAME}_sum"])


async def test_a_blocked_event_loop_is_visible_in_the_metrics() -> None:
    async with (
        probe_server(settings(metrics_port=0), "api", lambda: "") as address,
        aiohttp.ClientSession() as session,
        asyncio.timeout(20),
    ):
        count, before = await measured(session, address)
        # A measurement begins at once after the previous one, so it is due while the loop sleeps.
        time.sleep(LAG_INTERVAL_SECONDS + BLOCKED_SECONDS)  # noqa: ASYNC251
        after = before
        while after < before + BLOCKED_SECONDS:
            new_count, after = await measured(session, address)
        assert new_count > count
