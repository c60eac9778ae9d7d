"""Compares the OpenAPI document with the gateway: schemathesis generates valid and invalid requests
from it. It checks that no status is 500 or above, that every response is documented (status, media
type, headers and body), that valid requests are accepted and invalid ones rejected, and that other
methods get 405.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from img2img_server.api.keys import KeyRing, new_key
from img2img_server.domain.models import WorkerInfo
from img2img_server.gateway.server import serve
from img2img_server.lifecycle import first_of
from img2img_server.storage.vault import new_key as new_storage_key
from img2img_server.tasks import background_task
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.http_stack import V6, body, fetch_photo, photo_base64
from tests.stack import running_api, running_worker, settings

HOOKS = Path(__file__).parents[1] / "openapi_hooks.py"
EXAMPLES_OF_AN_OPERATION = 10
# The paths below /api/v6 have the endpoints and the schemas of the paths below /api/v1. So one
# request for each documented example suffices. An estimate takes the requests of POST /v1/jobs,
# which has the coverage of their schema. The coverage of OpenAI's edits would take as long as
# that of all other paths, and schemathesis counts forms as invalid that are valid as they are sent;
# tests/contract/test_openai_api.py has its cases.
CONFIG = """
[[operations]]
include-path-regex = "^/api/v6/"
phases = { coverage = { enabled = false }, fuzzing = { enabled = false } }

[[operations]]
include-path-regex = "^/v1/jobs:estimate"
phases = { coverage = { enabled = false } }

[[operations]]
include-path-regex = "^/v1/images/"
phases = { coverage = { enabled = false } }
checks = { negative_data_rejection = { enabled = false } }
"""
IDLE = replace(FAKE_MODEL, name="idle")  # a model without a worker, so its jobs wait
# The test runs in two processes, which halves its time on two processors.
HALVES = [
    f"--{verb}-path-regex=^/(v1|api/v1/enterprise/update_s3)" for verb in ("include", "exclude")
]
SECONDS = 360.0  # less than a minute on two idle cores


@asynccontextmanager
async def everything(folder: Path) -> AsyncIterator[tuple[str, dict[str, object]]]:
    """Yields the address of a complete gateway, and the values for the hooks. There are two
    tenants, so that the storage settings of one do not affect the images of the other.
    """
    (maker, maker_entry), (manager, manager_entry) = (
        new_key("maker", ["unsafe"]),
        new_key("manager", ["manage"]),
    )
    file = folder / "keys.toml"
    file.write_text(f"{maker_entry}\n{manager_entry}")
    bus = memory_bus(queue_limit=100_000, storage_keys=new_storage_key())
    blobs, stop = MemoryBlobStore(), asyncio.Event()

    async def work() -> None:  # The worker comes back after a restart command.
        while not stop.is_set():
            async with running_worker(bus, blobs=blobs) as worker:
                await first_of(stop.wait(), asyncio.wait([worker.task]))

    idle = WorkerInfo(name="idle", model=IDLE, device="cpu")
    await bus.workers.announce(idle)
    api_settings = settings(queue_limit=100_000, stream_token_keys="k" * 32, upload_bytes=2**40)
    keys = KeyRing(file, dev_key=False)
    async with (
        background_task(work()) as working,
        running_api(bus, api_settings, fetch=fetch_photo, keys=keys, blobs=blobs) as api,
    ):
        address = asyncio.get_running_loop().create_future()
        config = settings(
            api_address=api.address,
            http_port=0,
            wait_seconds=1,
            max_side_pixels=FAKE_MODEL.max_side_pixels,
        )
        async with background_task(serve(config, blobs, stop, address.set_result)) as serving:
            url = f"http://{await address}"
            known = {"url": url, "maker": maker, "manager": manager, "image": photo_base64()}
            models = {"model": FAKE_MODEL.name, "idle": IDLE.name}
            yield url, known | models | await _some_jobs(url, maker)
            stop.set()
            await serving
            await working


async def _some_jobs(url: str, key: str) -> dict[str, object]:
    """Creates two jobs and waits until they have ended, one of them with `temp`, and an upload.
    Returns the ids of the first job and of the upload, and the names of the files.
    """
    async with httpx.AsyncClient(base_url=url) as http:
        made = [
            (await http.post(f"{V6}/img2img", json=body(key=key, temp=temp))).json()
            for temp in (False, True)
        ]
        image = {"key": key, "image": photo_base64()}
        upload = (await http.post("/v1/uploads", json=image)).json()["upload"]
    links = [job["output"][0].split("/") for job in made]
    upload_id = upload["name"].removeprefix("uploads/")
    return {
        "upload": upload_id,
        "job": str(made[0]["id"]),
        "names": {folder: name for *_, folder, name in links},
    }


async def report_of(folder: Path, known: dict[str, object], selection: str) -> str:
    """Runs schemathesis for some operations and returns its report."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("schemathesis"),
        "run",
        f"{known['url']}/openapi.json",
        selection,
        f"--max-examples={EXAMPLES_OF_AN_OPERATION}",
        "--phases=examples,coverage,fuzzing",
        "--generation-deterministic",
        "--no-shrink",
        "--continue-on-failure",
        "--warnings=off",
        "--exclude-checks=ignored_auth",  # The run removes keys, which the hooks insert again.
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(HOOKS.parent),
            "SCHEMATHESIS_HOOKS": HOOKS.stem,
            "KNOWN": json.dumps(known),
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(SECONDS):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return f"{output.decode()}\nexit code {process.returncode}"


async def test_every_response_is_as_documented_and_none_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    async with everything(tmp_path) as (_, known):
        reports = await asyncio.gather(*(report_of(tmp_path, known, half) for half in HALVES))
    requests = 0
    for report in reports:
        generated = re.search(r"(\d+) generated, \1 passed", report)
        assert generated, report
        assert report.endswith("exit code 0"), report
        requests += int(generated[1])
    assert requests >= 1400, reports
