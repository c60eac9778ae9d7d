"""Runs the commands of the README unchanged, against the whole service on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from benchmarks.local_stack import LocalStack, local_stack
from tests.readme import ROOT, blocks, fences

README = ROOT / "README.md"
BIN = Path(sys.executable).parent
ENVELOPE = {"sequence", "eventTime", "job"}
CHANGING = {"job", "id", "worker", "url", "output", "generationTime", "sigma"}
TOLERANCE = 2  # of 255; the limit of the determinism class BOUNDED


@dataclass(frozen=True)
class Reader:
    """Runs blocks of the README as a reader does who copies them into a terminal."""

    service: LocalStack
    folder: Path

    async def runs(self, sign: str, *, language: str = "sh") -> str:
        """Runs the only block that contains `sign` and returns its output."""
        [block] = [block for block in blocks(README, language) if sign in block.text]
        text = block.text.replace("127.0.0.1:50051", self.service.grpc_address)
        text = text.replace("http://127.0.0.1:8080", self.service.http_url)
        text = text.replace(".venv/bin/", "")
        command = ["bash", "-euo", "pipefail", "-c", text]
        if language == "python":
            command = [sys.executable, "-c", text]
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{self.folder}:{BIN}:{os.environ['PATH']}",
                "IMG2IMG_SERVER": self.service.grpc_address,
                "COLUMNS": "100",
            },
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return out.decode()

    async def pixels(self, source: str) -> np.ndarray:
        """Returns an image by its link, or by its name in the folder of the commands."""
        path = self.folder / source
        if source.startswith("http"):
            async with httpx.AsyncClient() as http:
                answer = (await http.get(source)).raise_for_status()
            path = self.folder / "fetched.png"
            path.write_bytes(answer.content)
        with Image.open(path) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"), dtype=np.int16)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    grpcurl = folder / "grpcurl"
    grpcurl.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/grpcurl.py" "$@"\n')
    grpcurl.chmod(0o755)
    async with local_stack(folder / "state") as service:
        yield Reader(service, folder)


def shown_after(sign: str, *, language: str = "sh") -> str:
    """Returns the block that the README shows as the output of the block that contains `sign`."""
    every = fences(README)
    [place] = [
        number
        for number, block in enumerate(every)
        if block.language == language and sign in block.text
    ]
    [output] = [block for block in every[place + 1 : place + 2] if block.language == "text"]
    return output.text


def normal(text: str) -> list[str]:
    """Returns the lines of a text without the values that change in every run: numbers, ids and the
    worker's name.
    """
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", text)
    text = re.sub(r"worker \S+", "worker NAME", re.sub(r"\d+(\.\d+)?", "0", text))
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def assert_printed(output: str, shown: str) -> None:
    """Asserts that every shown line was printed. … and ... match any text."""
    for line in normal(shown.replace("...", "…")):
        pattern = re.escape(line).replace("…", ".*")
        assert any(re.fullmatch(pattern, each) for each in normal(output)), f"{line}\n{output}"


def parsed(shown: str) -> Any:
    """Returns the shown JSON without the parts that … replaces."""
    return json.loads(re.sub(r'("\w+": )?(…|\[\.\.\.\]|\.\.\.)(?=[\]},])', '"…": 0', shown))


def assert_within(shown: Any, printed: Any, where: str) -> None:
    """Asserts that all shown values were printed. Of values that change in every run, only the type
    is compared.
    """
    if isinstance(shown, dict):
        for name, value in shown.items():
            if name == "…":
                continue
            assert name in printed, f"{where}.{name} is shown, but not printed: {printed}"
            if name not in CHANGING:
                assert_within(value, printed[name], f"{where}.{name}")
            else:
                assert type(value) is type(printed[name]), f"{where}.{name}"
    else:
        assert shown == printed, where


@pytest.mark.asyncio(loop_scope="module")
async def test_every_way_to_ask_gives_the_same_image(reader: Reader) -> None:
    assert_printed(await reader.runs("img2img generate"), shown_after("img2img generate"))
    painted = await reader.pixels("painting.png")
    assert painted.shape == (416, 624, 3), "the aspect ratio of the photo"

    (reader.folder / "painting.png").unlink()
    printed = await reader.runs("Client(", language="python")
    assert_printed(printed, shown_after("Client(", language="python"))
    assert np.abs(painted - await reader.pixels("painting.png")).max() <= TOLERANCE
    url, seed = printed.split()[:2]
    assert seed == "1"
    assert np.abs(painted - await reader.pixels(url)).max() <= TOLERANCE

    events = json.loads("[" + (await reader.runs("/Generate")).replace("\n}\n{", "\n},\n{") + "]")
    for line in shown_after("/Generate").splitlines():
        event = parsed(line)["event"]
        [kind] = set(event) - ENVELOPE - {"…"}
        same = [one for one in events if kind in one["event"]]
        assert_within(event, same[0]["event"], kind)
    kinds = [next(kind for kind in event["event"] if kind not in ENVELOPE) for event in events]
    assert (kinds[0], kinds[1], kinds[-1]) == ("snapshot", "queued", "succeeded")
    [link] = [
        event["event"]["sampleStored"]["url"]
        for event, kind in zip(events, kinds, strict=True)
        if kind == "sampleStored"
    ]
    assert np.abs(painted - await reader.pixels(link)).max() <= TOLERANCE

    if shutil.which("curl") is None:
        pytest.skip("the README's HTTP request needs curl, which is missing here")
    answer = json.loads(await reader.runs("curl -s"))
    assert_within(parsed(shown_after("curl -s")), answer, "")
    assert answer["status"] == "success"
    # The size of the HTTP contract is fixed.
    assert (await reader.pixels(answer["output"][0])).shape == (512, 512, 3)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_server_describes_itself_and_its_limits(reader: Reader) -> None:
    answer = json.loads(await reader.runs("GetCapabilities"))
    assert answer["models"][0]["workers"] == 1
    assert answer["limits"]["maxSamples"] == 4


def test_every_command_of_the_readme_is_run_by_a_test_or_by_ci() -> None:
    signs = ("img2img generate", "GetCapabilities", "/Generate", "curl", "make ", "helm install")
    unknown = [b.text for b in blocks(README, "sh") if not any(sign in b.text for sign in signs)]
    assert unknown == []
