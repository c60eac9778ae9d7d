"""A role exports its own metrics, and counters that alerts read from 0 on."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from prometheus_client import Counter

from img2img_server import __version__
from img2img_server.telemetry import count_from_zero, probe_server
from tests.stack import settings


async def exported(role: str) -> str:
    async with (
        asyncio.timeout(20),
        probe_server(settings(metrics_port=0), role, lambda: "") as address,
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}/metrics") as answer,
    ):
        return await answer.text()


@pytest.mark.parametrize(
    ("role", "own", "other"),
    [
        ("api", "img2img_watchers", "img2img_jobs_running"),
        ("worker", "img2img_steps_total", "img2img_watchers"),
        ("gateway", "process_cpu_seconds_total", "img2img_nats_reconnects_total"),
    ],
)
async def test_a_role_exports_no_zeros_of_the_other_roles(role: str, own: str, other: str) -> None:
    names = {line.split("{")[0].split(" ")[0] for line in (await exported(role)).splitlines()}
    assert own in names
    assert other not in names


async def test_the_version_of_a_role_is_a_label() -> None:
    text = await exported("gateway")
    assert f'img2img_build_info{{role="gateway",version="{__version__}"}} 1.0' in text


async def test_a_stopping_role_does_not_wait_for_probes_without_a_response() -> None:
    asked, requests = asyncio.Event(), []

    async def never() -> str:
        asked.set()
        await asyncio.Event().wait()
        return ""

    async with asyncio.timeout(30), aiohttp.ClientSession() as session:
        async with probe_server(settings(metrics_port=0), "api", never) as address:
            requests.append(asyncio.create_task(session.get(f"http://{address}/readyz")))
            await asked.wait()
        (outcome,) = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(outcome, aiohttp.ClientConnectionError)


def test_a_counter_of_an_alert_begins_with_zero_for_each_value() -> None:
    counter = Counter("img2img_test_of_zero_total", "A test.", ["model", "state"], registry=None)
    count_from_zero(counter, ["a", "b"], ["failed"])
    samples = {
        sample.labels["model"]: sample.value
        for metric in counter.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    }
    assert samples == {"a": 0.0, "b": 0.0}
