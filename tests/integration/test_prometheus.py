"""A real Prometheus reads the roles of `local` under load: every panel of the dashboard has data,
and the alert of a slow queue fires while callers wait. `make monitoring` runs it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from benchmarks.local_stack import LocalStack, free_port, local_stack
from img2img_client import AsyncClient, NotFoundError
from img2img_server.tasks import background_task
from tests.chart_render import NAMESPACE, ROOT, of_kind, render
from tests.receiver import Receiver, receiving

PROMETHEUS = ROOT / ".tools" / "prometheus"
PHOTO = ROOT / "examples" / "cat.jpg"
ROLES = ("worker", "api", "gateway")  # the order of the ports of `local`
QUEUE_SECONDS = 3
JOBS = 6

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("MONITORING") != "1", reason="it takes a minute: `make monitoring` runs it"
    ),
    pytest.mark.skipif(
        not PROMETHEUS.exists(), reason="prometheus is not in .tools/: run `make chart`, on Debian"
    ),
]


def ports_in_a_row() -> int:
    """Returns the first of three free ports that follow each other."""
    while True:
        first = free_port()
        try:
            for port in range(first, first + 3):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except (OSError, OverflowError):
            continue
        return first


class Prometheus:
    """A Prometheus server that scrapes the roles each second and evaluates the chart's rules."""

    def __init__(self, port: int, session: aiohttp.ClientSession) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"
        self._session = session

    async def get(self, path: str, **query: str) -> Any:
        async with self._session.get(f"{self._url}/{path}", params=query) as answer:
            body = await answer.json()
        assert body["status"] == "success", body
        return body["data"]

    async def values(self, expression: str) -> list[float]:
        found = await self.get("query", query=expression)
        assert found["resultType"] == "vector"
        return [float(each["value"][1]) for each in found["result"]]

    async def firing(self) -> set[tuple[str, str]]:
        """Returns the name and the model of each alert that fires."""
        alerts = (await self.get("alerts"))["alerts"]
        return {
            (each["labels"]["alertname"], each["labels"].get("model", ""))
            for each in alerts
            if each["state"] == "firing"
        }


@asynccontextmanager
async def prometheus(folder: Path, metrics_port: int) -> AsyncIterator[Prometheus]:
    given = [
        f"--set=monitoring.prometheusRule.queueSeconds={QUEUE_SECONDS}",
        "--set=monitoring.prometheusRule.alerts.Img2ImgQueueSlow.for=1s",
    ]
    (rule,) = of_kind(render("production", *given), "PrometheusRule").values()
    (folder / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]), encoding="utf-8")
    targets = [
        {
            "targets": [f"127.0.0.1:{metrics_port + place}"],
            "labels": {
                "namespace": NAMESPACE,
                "service": f"{NAMESPACE}-img2img-{role}-headless",
                "pod": f"{role}-0",
            },
        }
        for place, role in enumerate(ROLES)
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "img2img", "static_configs": targets}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        PROMETHEUS,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    )
    try:
        async with aiohttp.ClientSession() as session:
            server = Prometheus(port, session)
            async with asyncio.timeout(30):
                while True:
                    try:
                        if await server.values("sum(up)") == [len(ROLES)]:
                            break
                    except aiohttp.ClientConnectionError:
                        assert process.returncode is None, "prometheus ended"
                    await asyncio.sleep(0.2)
            yield server
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def panels() -> dict[str, list[str]]:
    board = json.loads((ROOT / "helm/img2img/files/dashboard.json").read_text(encoding="utf-8"))
    return {
        panel["title"]: [
            re.sub(r"\$\w+", ".*", target["expr"].replace("$namespace", NAMESPACE))
            for target in panel["targets"]
        ]
        for panel in board["panels"]
    }


async def load(stack: LocalStack, receiver: Receiver) -> None:
    """Sends jobs over gRPC, one over HTTP with a webhook and a wrong call; waits for the ends."""
    image = base64.b64encode(PHOTO.read_bytes()).decode()
    body = {
        "key": "dev-key",
        "prompt": "an oil painting",
        "init_image": image,
        "webhook": receiver.url,
        "track_id": "1",
    }
    async with (
        AsyncClient(stack.grpc_address, api_key="dev-key") as client,
        aiohttp.ClientSession(base_url=stack.http_url) as session,
        asyncio.TaskGroup() as tasks,
    ):
        for seed in range(JOBS):
            options = {"strength": 1.0, "seed": seed, "num_inference_steps": 20}
            tasks.create_task(client.generate("an oil painting", PHOTO, **options))
        async with session.post("/api/v6/realtime/img2img", json=body) as answer:
            assert answer.status == 200
        with pytest.raises(NotFoundError):
            await client.get("jobs/1")


async def read_index(stack: LocalStack) -> None:
    """Reads a page twice a second: a histogram has a rate from the second request on."""
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(stack.http_url) as answer:
                await answer.read()
            await asyncio.sleep(0.5)


async def test_every_panel_has_data_and_the_slow_queue_fires_while_callers_wait(
    tmp_path: Path,
) -> None:
    first = ports_in_a_row()
    async with (
        asyncio.timeout(400),
        local_stack(tmp_path / "state", IMG2IMG_METRICS_PORT=str(first)) as stack,
        receiving() as receiver,
        prometheus(tmp_path, first) as server,
        background_task(read_index(stack)),
    ):
        assert "Img2ImgQueueSlow" not in {name for name, _ in await server.firing()}
        running = asyncio.create_task(load(stack, receiver))
        while ("Img2ImgQueueSlow", "atelier") not in await server.firing():
            assert not running.done(), "all jobs ended and the alert did not fire"
            await asyncio.sleep(0.5)
        await running
        # A series has a rate from its second scrape on.
        empty: dict[str, list[str]] = {}
        for _ in range(60):
            empty = {}
            for title, expressions in panels().items():
                for expression in expressions:
                    values = await server.values(expression)
                    if not values or all(map(math.isnan, values)):
                        empty.setdefault(title, []).append(expression)
            if not empty:
                break
            await asyncio.sleep(0.5)
        assert empty == {}
        (occupancy,) = await server.values(
            "sum(img2img_batch_forwards_sum) / sum(img2img_batch_forwards_count)"
            " / max(img2img_max_batch_size)"
        )
        assert 0 < occupancy <= 1
        assert {name for name, _ in await server.firing()} <= {"Img2ImgQueueSlow"}
