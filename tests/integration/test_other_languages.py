"""The examples in other languages, compiled with generated stubs, against a real api: previews, a
connection that breaks, and the details of an error. Each is skipped without its tools.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from img2img.v1 import job_pb2, service_pb2
from img2img_server.testing.fake_engine import FakeEngine
from tests.networks import Relay
from tests.readme import ROOT, fences
from tests.stack import DEV, WAIT_SECONDS, photo, running_stack

PAGE = ROOT / "docs" / "other-languages.md"
START_SECONDS = 60.0  # of a program on a busy machine


@dataclass(frozen=True)
class Example:
    """A compiled program, started in a folder of its own."""

    program: Path
    folder: Path

    @asynccontextmanager
    async def running(self, address: str, *arguments: str) -> AsyncIterator[Process]:
        environment = {**os.environ, "IMG2IMG_SERVER": address, "IMG2IMG_API_KEY": "dev-key"}
        process = await asyncio.create_subprocess_exec(
            self.program,
            *arguments,
            cwd=self.folder,
            env=environment,
            stdout=PIPE,
            stderr=PIPE,
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def build(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "proto/stubs.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.fixture(scope="module", params=["typescript-grpc-js", "typescript-connect", "java"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the example of a language, or skips its tests."""
    folder, language = tmp_path_factory.mktemp("stubs"), request.param
    built = build("--installed", f"--output={folder}", language)
    if ": skipped: " in built.stdout:
        pytest.skip(built.stdout.strip())
    assert built.returncode == 0, built.stderr
    return folder / language / "run"


@pytest.fixture
def example(program: Path, tmp_path: Path) -> Iterator[Example]:
    (tmp_path / "photo.jpg").write_bytes(photo())
    return Example(program, tmp_path)


async def test_an_example_shows_previews_and_resumes_after_the_connection_breaks(
    example: Example,
) -> None:
    engine = FakeEngine(hold_after=2)
    async with (
        running_stack(engine) as stack,
        Relay(stack.api.address).running() as relay,
        example.running(relay.address, "photo.jpg", "a harbour at dusk", "1.0") as process,
    ):
        assert process.stdout is not None
        lines = []
        async for line in process.stdout:
            lines.append(line.decode().strip())
            if lines[-1].endswith(" preview"):
                break
        relay.reset()
        async for line in process.stdout:
            lines.append(line.decode().strip())
            if "connection lost" in lines[-1]:
                engine.release()
        assert await process.wait() == 0
        listed = await stack.api.stub.ListJobs(service_pb2.ListJobsRequest(), metadata=DEV)
        [job] = listed.jobs
    assert (job.state, job.attempt) == (job_pb2.Job.STATE_SUCCEEDED, 1)
    with Image.open(example.folder / "preview.jpg") as preview:
        assert preview.format == "JPEG"
    numbers = [int(found[0]) for line in lines if (found := re.match(r"\d+", line))]
    assert numbers == sorted(set(numbers))
    steps = [line.partition(" ")[2] for line in lines if " step " in line]
    assert steps == [f"step {number} of 4" for number in (1, 2, 3, 4)]
    assert next(line for line in lines if "lost" in line).startswith("connection lost after event")
    assert lines[-1].endswith(" succeeded")
    with Image.open(example.folder / "output.png") as output:
        assert (output.format, output.size) == ("PNG", (512, 512))


async def test_an_example_prints_every_invalid_field(example: Example) -> None:
    async with (
        running_stack() as stack,
        example.running(stack.api.address, "photo.jpg", "", "2") as process,
    ):
        out, error = await process.communicate()
    assert (process.returncode, out) == (1, b"")
    title, *details = error.decode().splitlines()
    assert re.match(r"INVALID_?ARGUMENT: ", title, re.IGNORECASE)
    assert details[0] == "reason INVALID_REQUEST"
    assert sorted(line.split(":")[0] for line in details[1:]) == [
        "field prompt REQUIRED",
        "field strength OUT_OF_RANGE",
    ]


@pytest.mark.skipif(
    shutil.which("node") is None or not (ROOT / "node_modules/@grpc/reflection").is_dir(),
    reason="node and its package @grpc/reflection are not installed",
)
async def test_a_client_of_another_implementation_uses_reflection_v1() -> None:
    async with running_stack() as stack:
        script = Path(__file__).with_name("reflection_v1.mjs")
        process = await asyncio.create_subprocess_exec(
            "node", script, stack.api.address, cwd=ROOT, stdout=PIPE
        )
        out, _ = await asyncio.wait_for(process.communicate(), WAIT_SECONDS)
    assert process.returncode == 0
    assert "img2img.v1.Img2ImgService" in json.loads(out)


def test_the_code_of_the_page_is_that_of_the_examples() -> None:
    sources = [path.read_text() for path in sorted((ROOT / "examples").glob("*/*.*"))]
    blocks = [block for block in fences(PAGE) if block.language in ("ts", "java")]
    assert {block.language for block in blocks} == {"ts", "java"}
    for block in blocks:
        assert any(block.text in source for source in sources), block.text


def test_the_page_lists_every_language_that_has_a_template() -> None:
    templates = {path.name for path in (ROOT / "proto" / "stubs").iterdir()}
    assert set(re.findall(r"`(buf\.gen\.[\w-]+\.yaml)`", PAGE.read_text())) == templates
    known = build("esperanto").stderr.strip().partition("choose from ")[2].split(", ")
    assert {f"buf.gen.{name}.yaml" for name in known} == templates


def test_a_language_is_skipped_with_the_programs_that_are_missing() -> None:
    built = build("--installed", "rust", PATH="")
    expected = r"rust: skipped: (buf and )?protoc-gen-prost and protoc-gen-tonic not installed\n"
    assert (built.returncode, built.stderr) == (0, "")
    assert re.fullmatch(expected, built.stdout)
