"""Common code of the engine's tests: jobs, a sink on which tests can wait, and the stock
pipeline.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from img2img_server.domain.params import JobParams
from img2img_server.engine.base import (
    DeviceLost,
    Engine,
    EngineEvent,
    EngineJob,
    JobDone,
    JobFailed,
    JobStopped,
    JobSuspended,
    SampleReady,
)
from img2img_server.engine.denoiser import Denoiser
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.schedules import make_scheduler
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.memory import MemoryModel
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.imaging.base import Pixels

# More threads make networks of this size slower.
torch.set_num_threads(1)

SECONDS = 30.0
# The largest allowed difference of a pixel, of 255, from the stock pipeline and between batches.
BOUND = 2


class ReplyInbox:
    """A sink on which tests can wait."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()

    def __call__(self, event: EngineEvent) -> None:
        self._events.put(event)

    def until(self, *kinds: type) -> list[EngineEvent]:
        """Returns the events up to and including the first one of these kinds."""
        events: list[EngineEvent] = []
        while not events or not isinstance(events[-1], kinds):
            events.append(self._events.get(timeout=SECONDS))
        return events

    def all(self) -> list[EngineEvent]:
        """Returns the events up to and including the last one of the job."""
        return self.until(JobDone, JobStopped, JobSuspended, JobFailed, DeviceLost)

    def is_empty(self) -> bool:
        return self._events.empty()


def blocks(height: int, width: int, seed: int = 0) -> Pixels:
    """Returns an image of coloured 8 x 8 blocks."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return colours.repeat(8, axis=0).repeat(8, axis=1)


_ENGINE_JOB = {field.name for field in fields(EngineJob)}


def job(**changes: Any) -> EngineJob:
    """Returns a small job. `seeds` must be consecutive; all other arguments are fields of
    JobParams.
    """
    seeds = changes.pop("seeds", (5,))
    assert list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    own = {name: changes.pop(name) for name in _ENGINE_JOB & changes.keys()}
    given = {"prompt": "a boat", "num_inference_steps": 4, "scheduler": "ddim"} | changes
    params = JobParams(seed=seeds[0], samples=len(seeds), **given)
    return EngineJob(
        **{"job_id": 1, "tenant": "t", "params": params, "init_image": blocks(64, 72)} | own
    )


def load(folder: Path) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(str(folder), torch.device("cpu"), torch.float32)


@contextmanager
def running(
    denoiser: Denoiser, max_batch_size: int = 8, memory: MemoryModel | None = None, **limits: Any
) -> Iterator[Engine]:
    """Yields an engine on the denoiser. `limits`: those of its ModelSpec."""
    spec = ModelSpec(source="", name="tiny", **{"max_num_inference_steps": 1000, **limits})
    engine = DiffusionEngine(denoiser, spec, max_batch_size, memory)
    try:
        yield engine
    finally:
        engine.stop()


def run(engine: Engine, wanted: EngineJob) -> list[EngineEvent]:
    """Runs one job to its end."""
    inbox = ReplyInbox()
    engine.submit(wanted, inbox)
    return inbox.all()


def images(events: list[EngineEvent]) -> list[Pixels]:
    """Returns the images of a job that succeeded, by sample."""
    assert isinstance(events[-1], JobDone), events[-1]
    found = {event.sample: event.pixels for event in events if isinstance(event, SampleReady)}
    return [found[sample] for sample in sorted(found)]


def stock_call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of a stock image-to-image pipeline for a request."""
    return {
        "prompt": wanted.params.prompt,
        "negative_prompt": wanted.params.negative_prompt or None,
        "image": Image.fromarray(wanted.init_image),
        "strength": wanted.params.strength,
        "num_inference_steps": wanted.params.num_inference_steps,
        "guidance_scale": wanted.params.guidance_scale,
    }


def text_to_image_call(wanted: EngineJob, channels: int, side_scale: int = 8) -> dict[str, Any]:
    """Returns the arguments of a stock text-to-image pipeline for a request of strength 1.

    `latents` is a function of the generator; it returns the noise that our rows begin with.

    Args:
        channels: The number of channels of the latents.
        side_scale: Pixels of an image's side per latent.
    """
    height, width, _ = wanted.init_image.shape
    shape = (1, channels, height // side_scale, width // side_scale)

    def latents(generator: torch.Generator) -> torch.Tensor:
        # The generator first draws the noise of the autoencoder.
        torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator)

    arguments = {**stock_call(wanted), "height": height, "width": width, "latents": latents}
    del arguments["image"], arguments["strength"]
    return arguments


class Stock:
    """The image-to-image pipeline of diffusers as in its documentation, one sample at a time.

    Args:
        call: Returns the pipeline's arguments for a request.
    """

    def __init__(
        self,
        folder: Path,
        call: Callable[[EngineJob], dict[str, Any]] = stock_call,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        files = ModelFiles.read(folder)
        family = detect(files, str(folder))
        pipeline_class = getattr(diffusers, family.pipelines[files.class_name])
        options = {**dict.fromkeys(files.absent_parts), **family.load_options}
        self._pipeline = pipeline_class.from_pretrained(folder, dtype=dtype, **options)
        self._pipeline.set_progress_bar_config(disable=True)
        self._config = dict(self._pipeline.scheduler.config)
        self._call = call

    def images(self, wanted: EngineJob) -> list[Pixels]:
        """Returns the images of all samples."""
        self._pipeline.scheduler = make_scheduler(wanted.params.scheduler, self._config)
        return [self._image(wanted, seed) for seed in wanted.seeds]

    def _image(self, wanted: EngineJob, seed: int) -> Pixels:
        generator = torch.Generator().manual_seed(seed)
        scheduler: Any = self._pipeline.scheduler
        if scheduler.config.get("stochastic_sampling"):
            # The pipelines pass no generator to this function.
            scheduler.step = partial(type(scheduler).step, scheduler, generator=generator)
        arguments = self._call(wanted)
        if callable(latents := arguments.get("latents")):
            arguments["latents"] = latents(generator).to(self._pipeline.dtype)
        images = self._pipeline(
            **arguments,
            generator=generator,
            output_type="pil",
        ).images
        return np.asarray(images[0])


def difference(one: Pixels, other: Pixels) -> int:
    """Returns the largest difference of any pixel."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())
