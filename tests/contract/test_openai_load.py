"""NVIDIA's load generator AIPerf as a client of OpenAI's Images API.

It has more than a hundred dependencies, so it belongs into a virtual environment of its own:
`python3 -m venv /tmp/aiperf && /tmp/aiperf/bin/pip install aiperf`, then the tests with
`AIPERF=/tmp/aiperf/bin/aiperf`.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from readme import ROOT

from tests.http_stack import served_gateway

AIPERF = os.environ.get("AIPERF") or shutil.which("aiperf")
TOKENIZER = ROOT / "server/img2img_server/models/atelier/tokenizer"
REQUESTS = 12


@pytest.mark.skipif(AIPERF is None, reason="aiperf is not installed; AIPERF names its command")
async def test_the_image_edit_endpoint_of_aiperf_completes_every_request(tmp_path: Path) -> None:
    async with served_gateway() as gateway:
        gateway.engine.release()
        options = {
            "model": "fake",
            "endpoint-type": "image_edit",
            "url": f"http://{gateway.address}",
            "api-key": "dev-key",
            "image-width-mean": "96",
            "image-height-mean": "64",
            "image-batch-size": "1",
            "synthetic-input-tokens-mean": "8",
            "tokenizer": str(TOKENIZER),
            "request-count": str(REQUESTS),
            "concurrency": "3",
            "extra-inputs": "strength:0.5",
            "ui": "none",
            "artifact-dir": str(tmp_path),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        process = await asyncio.create_subprocess_exec(
            str(AIPERF), "profile", *arguments, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        job = await gateway.stack.api.get(f"jobs/{10_000_000 + REQUESTS}")
    found = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert (found["completed_request_count"]["avg"], found["error_summary"]) == (REQUESTS, [])
    assert job.spec.strength == 0.5
