"""Finishes a decoded sample: safety check, encoding for the caller, upload."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import structlog

from img2img_server.domain.events import (
    SampleFinished,
    SampleStored,
    Stage,
    StageFinished,
    StorageWaiting,
)
from img2img_server.domain.job import Job, Timings
from img2img_server.domain.params import ImageFormat
from img2img_server.domain.stages import Span, seconds_by_stage
from img2img_server.engine.base import SampleReady
from img2img_server.errors import StorageError
from img2img_server.imaging.base import Pixels
from img2img_server.imaging.encode import encode_image, encoded
from img2img_server.safety.base import blank
from img2img_server.storage.vault import SealBrokenError
from img2img_server.storage.watched_blobs import OnWait
from img2img_server.tracing import TRACER
from img2img_server.worker.deps import WorkerDeps

log = structlog.get_logger()


class Stopwatch:
    """Notes when the stages of a job outside the engine ran."""

    def __init__(self) -> None:
        self.pulled = time.monotonic()
        self.spans: list[Span] = []

    @contextmanager
    def measure(self, stage: str, began: float = 0.0) -> Iterator[None]:
        """Measures the body as a stage of Timings, and makes a span of it.

        Args:
            began: Monotonic seconds when the stage began; 0.0: now.
        """
        began = began or time.monotonic()
        with TRACER.start_as_current_span(stage.replace("_", " ")):
            yield
        self.note(stage, began)

    def note(self, stage: str, began: float) -> None:
        """Adds a stage that ends now."""
        self.spans.append(Span(stage, began, time.monotonic()))

    def timings(self, engine: Sequence[Span]) -> Timings:
        """Returns the seconds of the stages on this worker.

        Args:
            engine: The spans of the engine. The job was held until the first one began.
        """
        held = Span("held", self.pulled, min((span.began for span in engine), default=self.pulled))
        seconds: dict[str, Any] = dict(seconds_by_stage([held, *self.spans, *engine]))
        return Timings(**seconds)


async def finish_sample(
    deps: WorkerDeps,
    job: Job,
    ready: SampleReady,
    watch: Stopwatch,
    began: float,
    on_wait: Callable[[StorageWaiting], Awaitable[None]],
) -> AsyncIterator[StageFinished | SampleFinished | SampleStored]:
    """Yields the stages that finished, the image once it is checked and encoded, then its link
    once it is stored.

    Args:
        began: Monotonic seconds when the image was decoded.
        on_wait: called once if the file has to wait for the store.

    Raises:
        SafetyCheckError: the requested check cannot run.
        StorageError: the store refused the file, or the wait took too long.
    """
    params, index = job.params, ready.sample
    pixels, nsfw = ready.pixels, False
    if deps.engine.model.denoising_steps(params):  # Otherwise it is the init image.
        yield StageFinished(stage=Stage.IMAGE_DECODED, sample=index)
    if params.safety_checker:
        with watch.measure("safety", began):
            async with deps.safety.turn:
                score = await asyncio.to_thread(deps.safety.check, pixels)
        began = time.monotonic()
        nsfw = score >= deps.safety_threshold
        pixels = blank(pixels) if nsfw else pixels
        yield StageFinished(stage=Stage.SAFETY_CHECKED, sample=index)
    with watch.measure("image_encode", began):
        inline = await asyncio.to_thread(
            encoded, pixels, params.output_format, params.output_quality
        )
    began = time.monotonic()
    seed = params.sample_seed(index)
    yield SampleFinished(sample=index, seed=seed, image=inline, nsfw=nsfw)

    png = inline.data if params.output_format is ImageFormat.PNG else None
    with watch.measure("upload", began):
        data, media_type, digest = await asyncio.to_thread(_file, pixels, png, params.base64)
        del pixels, ready, inline, png  # While the file waits, only its own bytes are held.

        async def waits(reason: str) -> None:
            await on_wait(StorageWaiting(sample=index, reason=reason))

        url = await _store(deps, job, index, data, media_type, waits)
    began = time.monotonic()
    yield SampleStored(sample=index, url=url, sha256=digest, size_bytes=len(data))
    watch.note("upload", began)  # The caller has the link.


def _file(pixels: Pixels, png: bytes | None, as_base64: bool) -> tuple[bytes, str, str]:
    """Returns the file to store, its media type and its SHA-256."""
    data = png or encode_image(pixels, ImageFormat.PNG)
    media_type = "image/png"
    if as_base64:
        data, media_type = base64.b64encode(data), "text/plain"
    return data, media_type, hashlib.sha256(data).hexdigest()


async def _store(
    deps: WorkerDeps, job: Job, index: int, data: bytes, media_type: str, on_wait: OnWait
) -> str:
    """Stores one sample's file and returns its link.

    If the tenant's storage rejects the file, it is stored in the service's own bucket and
    `storage_warning` reports that; the job does not fail.

    Raises:
        StorageError: the service's own bucket rejected the file, or could not be used for too long.
        UnavailableError: NATS is down.
    """
    key = job.file_key(index)
    if job.storage_version:
        try:
            details = await deps.storage.get(job.tenant, job.storage_version)
            if details is None:
                raise StorageError("the storage details are gone")
            await deps.tenant_s3.put(details, key.rpartition("/")[2], data, media_type)
            return job.future_urls[index]
        except (StorageError, SealBrokenError) as error:
            log.warning("file_kept_in_own_bucket", why=str(error), tenant=job.tenant)
    await deps.blobs.put(key, data, media_type, on_wait)
    return job.own_urls[index] if job.own_urls else job.future_urls[index]


def storage_warning(job: Job, retention_hours: int) -> str:
    """Returns the warning about files that are not at their announced links, or "" if there are
    none.
    """
    stored = [sample for sample in job.samples if sample.url]
    if all(sample.url == job.future_urls[sample.index] for sample in stored):
        return ""
    return (
        "Your S3 storage did not take the files; this service keeps them for "
        f"{retention_hours} hours."
    )
