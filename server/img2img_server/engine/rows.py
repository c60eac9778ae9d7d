"""What the engine keeps of a running job: its rows' tensors, its times, its events."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from img2img_server.domain.events import StepFinished
from img2img_server.domain.job import Timings
from img2img_server.engine.base import EngineEvent, EngineJob, JobDone, SampleReady, Sink
from img2img_server.engine.denoiser import Adapter, Conditioning, ImageLatents, TextInput
from img2img_server.engine.sampler import Schedule, Step, coefficient_table, draw_noise
from img2img_server.engine.scheduler import Key, Row
from img2img_server.imaging.base import Pixels

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class SampleState:
    """One row on the device.

    Attributes:
        slots: What the sampler keeps, 1 x c x h x w each, float32; the latents first.
        clean: The clean latents that the last step predicted, of the same shape.
        noise: Drawn for the coming step; kept until the step succeeded, so that a second try of it
            gets the same numbers.
    """

    run: EngineJobState
    index: int
    generator: torch.Generator
    slots: tuple[Tensor, ...]
    clean: Tensor
    steps_done: int = 0
    noise: Tensor | None = None

    @property
    def key(self) -> Key:
        return self.run.job.job_id, self.index

    @property
    def latents(self) -> Tensor:
        return self.slots[0]

    @property
    def next_step(self) -> Step:
        return self.run.schedule.steps[self.steps_done]

    @property
    def coefficients(self) -> Tensor:
        """Line of the coming step."""
        return self.run.table[self.steps_done]

    def draw(self) -> None:
        """Draws the noise of the coming step, once."""
        if self.next_step.draws_noise and self.noise is None:
            self.noise = draw_noise(self.generator, self.latents)

    def advance(self, slots: tuple[Tensor, ...], clean: Tensor) -> None:
        """Takes the result of the coming step."""
        self.slots, self.clean, self.noise = slots, clean, None
        self.steps_done += 1

    def step_done(self) -> StepFinished:
        """What is told of the step behind it."""
        steps = self.run.schedule.steps
        sigma = steps[self.steps_done - 1].sigma_after
        return StepFinished(sample=self.index, step=self.steps_done, total=len(steps), sigma=sigma)

    @property
    def wants_preview(self) -> bool:
        """Whether one was asked for after the step behind it; the last step gives the picture."""
        every = self.run.job.params.preview_interval_steps
        is_last = self.steps_done == len(self.run.schedule.steps)
        return bool(every) and self.steps_done % every == 0 and not is_last

    def ready(self, decode_began: float, pixels: Pixels) -> SampleReady:
        """Its picture is there."""
        self.run.note_decode(decode_began, time.monotonic())
        return SampleReady(self.index, pixels)


@dataclass(slots=True, eq=False)
class EngineJobState:
    """One job in the engine.

    `is_broken`: one of its pictures could not be read out.
    """

    job: EngineJob
    sink: Sink
    schedule: Schedule
    forwards: int
    table: Tensor
    batch_key: Hashable
    conditioning: Conditioning | None = None
    samples: list[SampleState] = field(default_factory=list)
    unfinished: int = 0
    started: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    decoded: float = 0.0
    shares: float = 0.0
    batches: int = 0
    is_broken: bool = False

    @classmethod
    def begin(
        cls,
        job: EngineJob,
        sink: Sink,
        schedule: Schedule,
        forwards: int,
        device: torch.device,
        batch_key: Hashable,
    ) -> EngineJobState:
        table = coefficient_table(schedule, device)
        return cls(job, sink, schedule, forwards, table, batch_key, unfinished=len(job.seeds))

    @property
    def text(self) -> TextInput:
        return text_of(self.job)

    @property
    def is_prepared(self) -> bool:
        return bool(self.samples)

    def rows(self, now: float) -> list[Row]:
        """What the scheduler is told."""
        job, params = self.job, self.job.params
        scale = params.lora_scale if params.lora else 0.0
        return [
            Row(
                job_id=job.job_id,
                sample=sample,
                tenant=job.tenant,
                lane=params.lane,
                height=job.height,
                width=job.width,
                forwards=self.forwards,
                steps=len(self.schedule.steps),
                enqueue_time=job.enqueue_time or now,
                batch_key=(self.batch_key, params.lora, scale),
                deadline=job.deadline,
            )
            for sample in range(len(job.seeds))
        ]

    def prepare(self, conditioning: Conditioning, image: ImageLatents) -> None:
        """Makes the samples, drawing in the order of diffusers: the autoencoder's, then ours."""
        schedule, samples = self.schedule, []
        for index, seed in enumerate(self.job.seeds):
            generator = torch.Generator().manual_seed(seed)
            latents = image.mean[None]
            if image.deviation is not None:
                latents = latents + image.deviation * draw_noise(generator, latents)
            noise = draw_noise(generator, latents)
            latents = schedule.init_signal * latents + schedule.init_noise * noise
            sample = SampleState(self, index, generator, (latents,), latents)
            samples.append(sample)
        self.conditioning, self.samples = conditioning, samples

    def note_step(self, seconds: float, share: float) -> None:
        """Counts a batch that some of its samples were in."""
        self.denoise += seconds
        self.shares += share
        self.batches += 1

    def note_decode(self, began: float, now: float) -> None:
        """Counts the time until a picture was there, once where several were on their way."""
        self.decode += now - max(began, self.decoded)
        self.decoded = now

    def done(self) -> JobDone:
        """Its end, with its timings: it ends now."""
        timings = Timings(
            encode=self.encode,
            denoise=self.denoise,
            decode=self.decode,
            engine=time.monotonic() - self.started if self.started else 0.0,
            steps=sum(sample.steps_done for sample in self.samples),
            batch_share=self.shares / self.batches if self.batches else 0.0,
        )
        return JobDone(timings, self.conditioning.warnings if self.conditioning else ())


def text_of(job: EngineJob) -> TextInput:
    """Returns the text input of a job."""
    params = job.params
    return TextInput(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        guidance_scale=params.guidance_scale,
        height=job.height,
        width=job.width,
        adapter=Adapter(params.lora, params.lora_scale) if params.lora else None,
    )


def emit(sink: Sink, job: EngineJob, event: EngineEvent) -> None:
    """Hands an event out. A sink that raises harms nobody but itself."""
    try:
        sink(event)
    except Exception:
        _log.exception("the sink of job %d failed", job.job_id)


def largest_size(samples: Sequence[SampleState]) -> tuple[int, int]:
    """Returns height and width of the largest image."""
    job = max((sample.run.job for sample in samples), key=lambda job: job.height * job.width)
    return job.height, job.width


def runs_of(samples: Sequence[SampleState]) -> list[EngineJobState]:
    """The jobs that some samples belong to, each once."""
    return list({sample.run.job.job_id: sample.run for sample in samples}.values())
