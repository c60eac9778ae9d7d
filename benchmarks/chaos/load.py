"""Jobs with callers that follow them, and the check of every event and image."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from minio import Minio
from PIL import Image

from benchmarks.chaos.service import Service
from img2img_client import AsyncClient, Img2ImgError, Result, Retry
from img2img_client.events import Ended, Event, Queued, Started, StepFinished
from img2img_server.nats.connection import connect
from img2img_server.nats.subjects import DEAD, JOBS

SEEDS = 6  # number of different requests
STEPS = 8
LONG_STEPS = 80  # A worker that stops has time to move such a job.
ENDS_SECONDS = 180.0  # seconds after the last request until every job must have ended
LEFT_SECONDS = 30.0  # seconds until the messages of ended jobs must be gone


@dataclass
class Followed:
    """A job as its caller saw it. `error`: why the caller got no image."""

    seed: int
    began: float
    events: list[tuple[float, Event]] = field(default_factory=list)
    result: Result | None = None
    error: str = ""
    ended: float = 0.0
    steps: int = STEPS
    has_started: asyncio.Event = field(default_factory=asyncio.Event)  # or it has ended

    @property
    def starts(self) -> list[Started]:
        return [event for _, event in self.events if isinstance(event, Started)]


@dataclass
class Damage:
    """The counts of one scenario. All of them should be 0. `faults`: a sentence for each."""

    jobs: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    wasted: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def is_zero(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.wasted or self.faults)


def init_image() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


class Load:
    """Sends jobs and follows them."""

    def __init__(self, service: Service, client: AsyncClient) -> None:
        self._service = service
        self._client = client
        self._image = init_image()
        self._expected: dict[tuple[int, int], tuple[str, ...]] = {}  # by seed and steps
        self._first = 0  # index of the first job of this scenario
        self._doubled = 0
        self.jobs: list[Followed] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Begins a scenario: earlier jobs do not count."""
        self._first = len(self.jobs)

    async def calm(self) -> None:
        """Generates each image once without faults, for the comparison."""
        jobs = [self.send(seed, steps) for steps in (STEPS, LONG_STEPS) for seed in range(SEEDS)]
        await asyncio.gather(*self._tasks)
        for job in jobs:
            assert job.result is not None, job.error
            self._expected[job.seed, job.steps] = _digests(job.result)
        assert len(set(self._expected.values())) == len(jobs)

    def send(self, seed: int | None = None, steps: int = STEPS) -> Followed:
        """Starts a job and its caller."""
        seed = len(self.jobs) % SEEDS if seed is None else seed
        job = Followed(seed, time.monotonic(), steps=steps)
        self.jobs.append(job)
        task = asyncio.create_task(self._follow(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def steady(self, jobs_a_second: float, until: asyncio.Event) -> None:
        """Sends jobs at this rate until the event is set, whatever happens to them."""
        while not until.is_set():
            self.send()
            await asyncio.sleep(1 / jobs_a_second)

    async def ended(self) -> None:
        """Waits until every caller has returned, or the time is over."""
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=ENDS_SECONDS)
            for task in left:
                task.cancel()

    async def _follow(self, job: Followed) -> None:
        try:
            async with self._client.stream(
                "chaos",
                self._image,
                seed=job.seed * 10,
                width=256,
                height=256,
                samples=2,
                strength=1.0,
                num_inference_steps=job.steps,
                guidance_scale=1.0,
                output_format="png",
                detach=True,
            ) as stream:
                async for event in stream:
                    job.events.append((time.monotonic(), event))
                    if isinstance(event, Started):
                        job.has_started.set()
                job.result = await stream.result()
        except Img2ImgError as error:
            job.error = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            job.error = "the job did not end"
        job.ended = time.monotonic()
        job.has_started.set()

    def moved_jobs(self) -> int:
        """Returns how many jobs another worker continued from a state."""
        jobs = self.jobs[self._first :]
        return sum(any(start.done_steps for start in job.starts) for job in jobs)

    def steps_between(self, start: float, end: float) -> int:
        """Returns the number of steps that callers saw between two monotonic times."""
        return sum(
            start <= at < end and isinstance(event, StepFinished)
            for job in self.jobs
            for at, event in job.events
        )

    def repeated_steps(self, found: Damage) -> int:
        """Returns how often a step of a sample ran again, and adds a sentence for each job."""
        repeated = 0
        for job in self.jobs[self._first :]:
            steps = [
                (event.sample, event.step)
                for _, event in job.events
                if isinstance(event, StepFinished)
            ]
            if again := len(steps) - len(set(steps)):
                repeated += again
                name = job.result.job.name if job.result else "a lost job"
                found.faults.append(f"wasted: {name}: {again} steps ran again")
        return repeated

    async def damage(self, *, loses_workers: bool = False) -> Damage:
        """Counts what went wrong.

        Args:
            loses_workers: workers lose jobs, so further attempts are expected.
        """
        jobs = self.jobs[self._first :]
        found = Damage(jobs=len(jobs))
        for job in jobs:
            if job.result is None:
                found.lost += 1
                found.faults.append(f"lost: {job.error}")
                continue
            wrong = list(faults(job, self._expected[job.seed, job.steps]))
            found.wrong += bool(wrong)
            found.faults += [f"wrong: {job.result.job.name}: {fault}" for fault in wrong]
            if attempts := wasted(job, loses_workers=loses_workers):
                found.wasted += attempts
                found.faults.append(f"wasted: {job.result.job.name}: {attempts} attempts")
        names = [job.result.job.name for job in self.jobs if job.result]
        recorded = [job.name async for job in self._client.list()]
        doubled = len(recorded) - len(self.jobs) + len(names) - len(set(names))
        # A request that was never accepted has no record; its caller counts as lost.
        found.doubled, self._doubled = max(0, doubled - self._doubled), max(0, doubled)
        if found.doubled:
            found.faults.append(f"doubled: {len(recorded)} records of {len(self.jobs)} requests")
        await self._check_files(jobs, found)
        await self._check_streams(found)
        return found

    async def _check_files(self, jobs: Sequence[Followed], found: Damage) -> None:
        """Compares every file in the bucket with the image that its caller got."""
        environment = self._service.environment
        client = Minio(
            environment["IMG2IMG_S3_ENDPOINT_URL"].removeprefix("http://"),
            environment["IMG2IMG_S3_ACCESS_KEY"],
            environment["IMG2IMG_S3_SECRET_KEY"],
            secure=False,
        )

        def stored(url: str) -> str:
            response = client.get_object("img2img", url.split("/", 3)[3])
            return hashlib.sha256(response.read()).hexdigest()

        for job in jobs:
            for image in job.result.images if job.result else ():
                try:
                    digest = await asyncio.to_thread(stored, image.url)
                except Exception as error:
                    digest = type(error).__name__
                if digest != image.sha256:
                    found.wrong += 1
                    found.faults.append(f"wrong file {image.url}: {digest}")

    async def _check_streams(self, found: Damage) -> None:
        urls = self._service.environment["IMG2IMG_NATS_URL"].split(",")
        async with connect(urls) as link:
            for name in (JOBS, DEAD):
                left = (await link.js.stream_info(name)).state.messages
                # The message of an ended job whose worker was lost before its ack is removed when
                # it is delivered again.
                until = time.monotonic() + LEFT_SECONDS
                while left and name == JOBS and time.monotonic() < until:
                    await asyncio.sleep(0.5)
                    left = (await link.js.stream_info(name)).state.messages
                if left:
                    found.lost += left
                    found.faults.append(f"lost: {left} messages left in {name}")


def open_client(service: Service) -> AsyncClient:
    """Returns a client whose streams survive an outage of a minute."""
    retry = Retry(resume_seconds=150.0, unavailable_seconds=90.0, connect_seconds=90.0)
    return AsyncClient(service.address, api_key="dev-key", retry=retry)


def _digests(result: Result) -> tuple[str, ...]:
    return tuple(image.sha256 for image in result.images)


def faults(job: Followed, expected: tuple[str, ...]) -> Iterable[str]:
    """Yields what is wrong with the events and images of a job that succeeded."""
    assert job.result is not None
    record, events = job.result.job, [event for _, event in job.events]
    numbers = [event.sequence for event in events]
    if numbers != list(range(len(numbers))):
        yield f"its events have the numbers {numbers}"
    if sum(isinstance(event, Ended) for event in events) != 1:
        yield "it has not one terminal event"
    if _digests(job.result) != expected:
        yield "its images differ from those of an undisturbed run"
    if tuple(sample.sha256 for sample in record.samples) != expected:
        yield "its files differ from its images"
    if record.timings is None:
        yield "it has no timings"
        return
    elapsed = job.ended - job.began
    timings: dict[str, Any] = {
        name: getattr(record.timings, name)
        for name in record.timings.__slots__
        if name.endswith("_seconds")
    }
    for name in ("queue_seconds", "total_seconds"):
        if not -0.001 <= timings[name] <= elapsed + 2.0:
            yield f"{name} is {timings[name]:.1f} s of {elapsed:.1f} s"


def wasted(job: Followed, *, loses_workers: bool) -> int:
    """Returns the attempts that were counted without need.

    An attempt whose job was requeued by its worker does not count. Where workers lose jobs, each
    attempt that a worker began is expected, otherwise only the first one. A worker can be killed
    once between the record, which counts the attempt, and the log.
    """
    assert job.result is not None
    expected, is_open = int(loses_workers), False
    for _, event in job.events:
        match event:
            case Started():
                expected += is_open and loses_workers
                is_open = True
            case Queued() if is_open:
                expected += 1
                is_open = False
    return max(0, job.result.job.attempt - 1 - expected)
