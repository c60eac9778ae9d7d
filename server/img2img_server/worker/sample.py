"""What happens to one finished picture: checked, sent to the caller, stored."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace

from img2img_server.domain.events import SampleFinished, SampleStored
from img2img_server.domain.job import Job, Timings
from img2img_server.domain.params import ImageFormat
from img2img_server.engine.base import EngineTimings, Pixels, SampleReady
from img2img_server.imaging.encode import encode_image, encoded
from img2img_server.safety.base import blank
from img2img_server.tracing import TRACER
from img2img_server.worker.deps import WorkerDeps
from img2img_server.worker.files import store_file


@dataclass
class Stopwatch:
    """Seconds of the stages that lie outside the engine, added up over the samples."""

    prepare: float = 0.0
    safety: float = 0.0
    image_encode: float = 0.0
    upload: float = 0.0

    def added(self, timings: Timings, engine: EngineTimings) -> Timings:
        """The job's timings with these and the engine's."""
        return replace(
            timings,
            **asdict(self),
            encode=engine.encode,
            denoise=engine.denoise,
            decode=engine.decode,
            engine=engine.engine,
            steps=engine.steps,
            batch_share=engine.batch_share,
        )


async def finish_sample(
    parts: WorkerDeps, job: Job, ready: SampleReady, watch: Stopwatch
) -> AsyncIterator[SampleFinished | SampleStored]:
    """Yields the picture as soon as it is checked and encoded, then its link once it is stored.

    Raises:
        SafetyCheckError: the check was asked for and cannot run.
        StorageError: the store refused the file, also after retries.
    """
    params, index, start = job.params, ready.sample, time.monotonic()
    pixels, nsfw = ready.pixels, False
    if params.safety_checker:
        with TRACER.start_as_current_span("safety"):
            async with parts.safety.turn:
                score = await asyncio.to_thread(parts.safety.check, pixels)
        nsfw = score >= parts.safety_threshold
        pixels = blank(pixels) if nsfw else pixels
        watch.safety += time.monotonic() - start
        start = time.monotonic()
    with TRACER.start_as_current_span("image encode"):
        inline = await asyncio.to_thread(encoded, pixels, params.output_format)
    watch.image_encode += time.monotonic() - start
    seed = params.sample_seed(index)
    yield SampleFinished(sample=index, seed=seed, image=inline, nsfw=nsfw)

    start = time.monotonic()
    png = inline.data if params.output_format is ImageFormat.PNG else None
    with TRACER.start_as_current_span("upload"):
        data, media_type, digest = await asyncio.to_thread(_file, pixels, png, params.base64)
        url = await store_file(parts, job, index, data, media_type)
    watch.upload += time.monotonic() - start
    yield SampleStored(sample=index, url=url, sha256=digest, size_bytes=len(data))


def _file(pixels: Pixels, png: bytes | None, as_base64: bool) -> tuple[bytes, str, str]:
    """The file to store, its media type and its SHA-256 (HTTP contract, section 7)."""
    data = png or encode_image(pixels, ImageFormat.PNG)
    media_type = "image/png"
    if as_base64:
        data, media_type = base64.b64encode(data), "text/plain"
    return data, media_type, hashlib.sha256(data).hexdigest()
