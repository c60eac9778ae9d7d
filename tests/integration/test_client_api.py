"""The client and the command against the real api and worker, with the fake engine."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from img2img_client import (
    AsyncClient,
    Client,
    Event,
    InvalidRequestError,
    JobEndedError,
    JobFailedError,
    NotFoundError,
    Retry,
    Snapshot,
    State,
    StepFinished,
    UnauthenticatedError,
)
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.stack import photo, running_api, running_stack, running_worker, settings

REQUEST: dict[str, Any] = {"prompt": "a harbour", "width": 256, "height": 256, "seed": 1}
RETRY = Retry(first_delay_seconds=0.01)
COMMAND = [sys.executable, "-c", "from img2img_client.cli import main; main()"]
WAIT_SECONDS = 60.0


def client(address: str, key: str = "dev-key") -> AsyncClient:
    return AsyncClient(address, api_key=key, retry=RETRY)


async def test_both_clients_get_the_same_image_for_the_same_seed() -> None:
    async with running_stack() as stack, client(stack.api.address) as ours:
        first = await ours.generate(init_image=photo(), samples=2, **REQUEST)

        def blocking() -> Any:
            with Client(stack.api.address, api_key="dev-key") as other:
                return other.generate(init_image=photo(), samples=2, **REQUEST)

        second = await asyncio.to_thread(blocking)
        listed = [job.name async for job in ours.list(State.SUCCEEDED)]
    assert [image.seed for image in first.images] == [1, 2]
    assert [p.sha256 for p in first.images] == [p.sha256 for p in second.images]
    for image in first.images:
        assert hashlib.sha256(image.data).hexdigest() == image.sha256
        assert image.url.endswith(f"-{image.index}.png")
    assert listed == [second.job.name, first.job.name]


async def test_a_stream_survives_a_restart_of_the_api_without_gap_or_duplicate() -> None:
    bus, engine = memory_bus(), FakeEngine(hold_after=1)
    async with running_worker(bus, engine):
        async with running_api(bus) as api:
            ours = client(api.address)
            port = int(api.address.rpartition(":")[2])
            stream = ours.stream(init_image=photo(), **REQUEST)
            seen: list[Event] = []
            async for event in stream:
                seen.append(event)
                if isinstance(event, StepFinished):
                    break
        async with running_api(bus, settings(grpc_port=port)), ours:
            engine.release()
            seen += [event async for event in stream]
            whole = [event async for event in ours.watch(stream.job_name)]
    assert (await stream.result()).job.state is State.SUCCEEDED
    numbers = [event.sequence for event in seen]
    assert numbers == list(range(len(numbers)))
    assert seen[1:] == whole[1:]  # All records except the snapshot, which is older.


async def test_leaving_a_stream_cancels_the_job_in_the_service() -> None:
    async with (
        running_stack(FakeEngine(hold_after=1)) as stack,
        client(stack.api.address) as ours,
    ):
        async with ours.stream(init_image=photo(), **REQUEST) as stream:
            async for event in stream:
                if isinstance(event, StepFinished):
                    break
        stack.worker.engine.release()
        ended = [event async for event in ours.watch(stream.job_name)][-1]
    assert type(ended).__name__ == "Cancelled"


async def test_every_violation_comes_back() -> None:
    async with running_stack() as stack, client(stack.api.address) as ours:
        with pytest.raises(InvalidRequestError) as caught:
            await ours.generate("", photo(), strength=1.5, width=513, samples=9)
    assert [(one.field, one.reason) for one in caught.value.violations] == [
        ("prompt", "REQUIRED"),
        ("width", "NOT_DIVISIBLE"),
        ("samples", "OUT_OF_RANGE"),
        ("strength", "OUT_OF_RANGE"),
    ]


async def test_refusals_and_failures_have_their_classes() -> None:
    async with running_stack() as stack, client(stack.api.address) as ours:
        done = await ours.generate(init_image=photo(), **REQUEST)
        with pytest.raises(JobEndedError):
            await ours.cancel(done.job)
        with pytest.raises(NotFoundError, match="jobs/10009999"):
            await ours.get(10009999)
        with pytest.raises(JobFailedError, match="no luck") as failed:
            await ours.generate(init_image=photo(), **{**REQUEST, "prompt": "fail:no luck"})
        assert failed.value.reason == "ENGINE_FAILED"
        async with client(stack.api.address, "wrong") as stranger:
            with pytest.raises(UnauthenticatedError):
                await stranger.capabilities()


async def test_a_request_id_gives_the_same_job_again() -> None:
    request_id = "7f1c2f6e-9d8b-4a52-8d0c-0a4a4d6c1f55"
    async with running_stack() as stack, client(stack.api.address) as ours:
        first = await ours.create(init_image=photo(), request_id=request_id, **REQUEST)
        again = await ours.generate(init_image=photo(), request_id=request_id, **REQUEST)
        found = await ours.capabilities()
    assert again.job.name == first.name
    assert [model.name for model in found.models] == [FAKE_MODEL.name]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Returns the arguments of a small valid command."""
    (tmp_path / "photo.jpg").write_bytes(photo())
    made = ["generate", "--prompt", "a harbour", "--init-image", str(tmp_path / "photo.jpg")]
    return [*made, "--width", "256", "--height", "256", "--seed", "1"]


async def start(address: str, *given: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *COMMAND, *given, "--server", address, stdout=pipe, stderr=pipe
    )


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_the_command_saves_the_image_that_the_service_stored(
    words: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out.png"
    async with running_stack() as stack:
        process = await start(stack.api.address, *words, "--output", str(output), "--json")
        stdout, stderr = await asyncio.wait_for(process.communicate(), WAIT_SECONDS)
        answer = json.loads(stdout)
        key = f"generations/{answer['samples'][0]['url'].rpartition('/')[2]}"
        stored = b"".join([part async for part in stack.worker.blobs.read(key)])
    assert (process.returncode, stderr) == (0, b"")
    assert answer["state"] == "succeeded"
    assert answer["samples"][0]["sha256"] == hashlib.sha256(stored).hexdigest()
    assert output.read_bytes().startswith(b"\x89PNG")


async def test_ctrl_c_on_the_command_cancels_the_job_in_the_service(
    words: list[str], tmp_path: Path
) -> None:
    engine = FakeEngine(hold_after=1)
    async with running_stack(engine) as stack, client(stack.api.address) as ours:
        output = tmp_path / "out.png"
        process = await start(
            stack.api.address, *words, "--preview-every", "1", "--output", str(output)
        )
        await asyncio.to_thread(wait_for_file, tmp_path / "out-preview.jpg")
        process.send_signal(signal.SIGINT)
        _, stderr = await asyncio.wait_for(process.communicate(), WAIT_SECONDS)
        engine.release()
        (job,) = [job async for job in ours.list()]
        events = [event async for event in ours.watch(job)]
    assert process.returncode == 130
    assert stderr.decode().startswith(f"{job.name} ")
    assert isinstance(events[0], Snapshot)
    assert type(events[-1]).__name__ == "Cancelled"
