"""The state of a running job: the tensors of its rows, its timings and its events."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from img2img_server.domain.events import StepFinished
from img2img_server.domain.job import Timings
from img2img_server.domain.stages import Span
from img2img_server.domain.strength import StrengthMode
from img2img_server.domain.warnings import no_preview
from img2img_server.engine.base import (
    EngineEvent,
    EngineJob,
    JobDone,
    JobPlan,
    JobState,
    SampleReady,
    Sink,
)
from img2img_server.engine.denoiser import (
    Adapter,
    Conditioning,
    Denoiser,
    Embeddings,
    ImageLatents,
    TextInput,
)
from img2img_server.engine.host_copy import to_device
from img2img_server.engine.sampler import Schedule, Step, coefficient_table, draw_noise
from img2img_server.engine.scheduler import Key, Row
from img2img_server.imaging.base import Pixels

_log = logging.getLogger(__name__)

_NO_INFLUENCE = 0.9999  # With a larger share of noise, nothing of the init image remains.


@dataclass(slots=True, eq=False)
class SampleState:
    """One row on the device.

    Attributes:
        slots: The tensors of the sampler, 1 x c x h x w each, float32; the latents first.
        clean: The clean latents that the last step predicted, of the same shape.
        noise: The noise of the next step, kept until the step succeeds, so that a retry uses the
            same numbers.
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
        """Returns the coefficients of the next step."""
        return self.run.table[self.steps_done]

    def draw(self) -> None:
        """Draws the noise of the next step, once."""
        if self.next_step.draws_noise and self.noise is None:
            self.noise = _noise(self.generator, self.latents)

    def advance(self, slots: tuple[Tensor, ...], clean: Tensor) -> None:
        """Stores the result of the next step."""
        self.slots, self.clean, self.noise = slots, clean, None
        self.steps_done += 1

    def step_done(self) -> StepFinished:
        """Returns the event of the last step."""
        steps = self.run.schedule.steps
        sigma = steps[self.steps_done - 1].sigma_after
        return StepFinished(sample=self.index, step=self.steps_done, total=len(steps), sigma=sigma)

    @property
    def wants_preview(self) -> bool:
        """Returns whether a preview follows the last step; the final one gives the image itself."""
        every = self.run.job.params.preview_interval_steps
        is_last = self.steps_done == len(self.run.schedule.steps)
        return bool(every) and self.steps_done % every == 0 and not is_last

    def ready(self, decode_began: float, share: float, pixels: Pixels) -> SampleReady:
        """Returns the event of the finished image. `share`: see note_decode."""
        self.run.note_decode(decode_began, time.monotonic(), share)
        return SampleReady(self.index, pixels)


@dataclass(slots=True, eq=False)
class EngineJobState:
    """One job in the engine.

    Attributes:
        device: Seconds of the device that the job has used.
        table: The coefficients of all steps on the device, so that a step copies nothing to it.
        adapters: The LoRAs of all steps, also after their files were replaced or deleted.
        embeddings: The embeddings of its prompts, in the same way.
        is_broken: One of the images could not be copied to the host.
        resumed: The samples that a suspended job continues with; prepare has set the others.
        finished_steps: Steps of samples that were finished before the job was suspended.
    """

    job: EngineJob
    sink: Sink
    schedule: Schedule
    forwards: int
    table: Tensor
    batch_key: Hashable
    adapters: tuple[Adapter, ...] = ()
    embeddings: Embeddings | None = None
    conditioning: Conditioning | None = None
    samples: list[SampleState] = field(default_factory=list)
    unfinished: int = 0
    started: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    decoded: float = 0.0
    device: float = 0.0
    shares: float = 0.0
    batches: int = 0
    spans: list[Span] = field(default_factory=list)
    last_active: float = 0.0
    is_broken: bool = False
    resumed: list[SampleState] = field(default_factory=list)
    finished_steps: int = 0
    warnings: tuple[str, ...] = ()

    @classmethod
    def begin(
        cls,
        job: EngineJob,
        sink: Sink,
        schedule: Schedule,
        forwards: int,
        device: torch.device,
        batch_key: Hashable,
        adapters: tuple[Adapter, ...] = (),
        embeddings: Embeddings | None = None,
    ) -> EngineJobState:
        return cls(
            job=job,
            sink=sink,
            schedule=schedule,
            forwards=forwards,
            table=to_device(coefficient_table(schedule), device),
            batch_key=batch_key,
            adapters=adapters,
            embeddings=embeddings,
            unfinished=len(job.indices),
        )

    @property
    def text(self) -> TextInput:
        return replace(text_of(self.job, self.adapters), embeddings=self.embeddings)

    @property
    def is_prepared(self) -> bool:
        return bool(self.samples)

    def rows(self, now: float) -> list[Row]:
        """Returns the rows of the job for the scheduler."""
        steps = len(self.schedule.steps)
        rows = rows_of(self.job, self.forwards, steps, self.batch_key, now)
        done = {sample.index: sample.steps_done for sample in self.resumed}
        return [replace(row, steps=steps - done.get(row.sample, 0)) for row in rows]

    def resume(self, state: JobState, samples: list[SampleState]) -> None:
        """Makes the job continue with these samples, and its sums with those of the state."""
        self.resumed = samples
        self.device, self.shares, self.batches = state.device_seconds, state.shares, state.batches
        self.finished_steps = state.finished_steps

    @property
    def engine_seconds(self) -> float:
        """Returns the seconds since the engine began with the job."""
        return time.monotonic() - self.started if self.started else 0.0

    def prepare(self, conditioning: Conditioning, image: ImageLatents | None) -> None:
        """Creates the samples; draws noise in the order of diffusers: first the autoencoder's.

        Without an image, the job continues with the samples of its state.
        """
        if image is None:
            self.conditioning, self.samples = conditioning, self.resumed
            return
        schedule, samples = self.schedule, []
        for index in self.job.indices:
            generator = torch.Generator().manual_seed(self.job.seeds[index])
            latents = image.mean[None]
            if image.deviation is not None:
                latents = latents + image.deviation * _noise(generator, latents)
            noise = _noise(generator, latents)
            latents = schedule.init_signal * latents + schedule.init_noise * noise
            sample = SampleState(self, index, generator, (latents,), latents)
            samples.append(sample)
        self.conditioning, self.samples = conditioning, samples

    def sample(self, index: int) -> SampleState:
        """Returns the sample of this index."""
        return next(sample for sample in self.samples if sample.index == index)

    def _note(self, stage: str, began: float, ended: float) -> None:
        """Adds a span, and the pause before it."""
        if self.last_active and began > self.last_active:
            self.spans.append(Span("paused", self.last_active, began))
        self.spans.append(Span(stage, began, ended))
        self.last_active = max(self.last_active, ended)

    def note_step(self, began: float, ended: float, share: float) -> None:
        """Adds a step of a batch with samples of the job to the timings."""
        self.denoise += ended - began
        self.device += (ended - began) * share
        self._note("denoise", began, ended)
        self.shares += share
        self.batches += 1

    def note_encode(self, began: float, ended: float, share: float) -> None:
        """Adds the encoding of the prompts and the init image to the timings.

        `share`: the job's share of the batch that was encoded.
        """
        self.started, self.encode = began, ended - began
        self.device += (ended - began) * share
        self._note("encode", began, ended)

    def note_decode(self, began: float, now: float, share: float) -> None:
        """Adds the time until an image was on the host to the timings; overlapping copies count
        once.

        `share`: the job's share of the batch that was decoded.
        """
        seconds = now - max(began, self.decoded)
        self.decode += seconds
        self.device += seconds * share
        self._note("decode", began, now)
        self.decoded = now

    def done(self) -> JobDone:
        """Builds the JobDone event of a job that ends now."""
        timings = Timings(
            encode=self.encode,
            denoise=self.denoise,
            decode=self.decode,
            engine=self.engine_seconds,
            steps=self.finished_steps + sum(sample.steps_done for sample in self.samples),
            batch_share=self.shares / self.batches if self.batches else 0.0,
        )
        texts = self.warnings
        if self.conditioning:
            texts = (*texts, *self.conditioning.warnings)
        params = self.job.params
        if params.strength_mode is StrengthMode.NOISE_LEVEL and (
            text := no_preview(
                params.preview_interval_steps, len(self.schedule.steps), is_exact=False
            )
        ):
            texts = (*texts, text)
        share = self.schedule.noise_share
        if share > _NO_INFLUENCE:
            texts = (*texts, f"At strength {params.strength:g} the init image had no influence.")
        spans = tuple(self.spans)
        return JobDone(timings, texts, len(self.schedule.steps), share, self.device, spans)


def _noise(generator: torch.Generator, like: Tensor) -> Tensor:
    """Draws noise on the device of a tensor."""
    return to_device(draw_noise(generator, like), like.device)


def rows_of(job: JobPlan, forwards: int, steps: int, batch_key: Hashable, now: float) -> list[Row]:
    """Returns the rows of a job for the scheduler.

    Args:
        batch_key: See `batch_key_of`.
    """
    params = job.params
    return [
        Row(
            job_id=job.job_id,
            sample=sample,
            tenant=job.tenant,
            lane=params.lane,
            height=job.height,
            width=job.width,
            forwards=forwards,
            steps=steps,
            enqueue_time=job.enqueue_time or now,
            batch_key=batch_key,
            deadline=job.deadline,
        )
        for sample in job.indices
    ]


def adapters_of(job: JobPlan, denoiser: Denoiser) -> tuple[Adapter, ...]:
    """Returns the LoRAs that have an effect on a job, with the present contents of their files.

    They are in the order of their names, so that jobs that name them in another order share
    batches and have the same images.
    """
    loras = sorted(job.params.loras, key=lambda lora: lora.name)
    return tuple(denoiser.adapter(lora.name, lora.scale) for lora in loras if lora.scale)


def batch_key_of(text: TextInput, denoiser: Denoiser) -> Hashable:
    """Returns the key that rows must share to take a step together."""
    return denoiser.batch_key(text), denoiser.adapter_key(text.adapters)


def text_of(job: JobPlan, adapters: tuple[Adapter, ...] = ()) -> TextInput:
    """Returns the text input of a job."""
    params = job.params
    return TextInput(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        guidance_scale=params.guidance_scale,
        true_cfg_scale=params.true_cfg_scale,
        prompt_weights=params.prompt_weights,
        clip_skip=params.clip_skip,
        height=job.height,
        width=job.width,
        adapters=adapters,
    )


def emit(sink: Sink, job: EngineJob, event: EngineEvent) -> None:
    """Calls the sink with an event. An error of the sink is only logged."""
    try:
        sink(event)
    except Exception:
        _log.exception("event_sink_failed: job %d", job.job_id)


def largest_size(samples: Sequence[SampleState]) -> tuple[int, int]:
    """Returns height and width of the largest image."""
    job = max((sample.run.job for sample in samples), key=lambda job: job.height * job.width)
    return job.height, job.width


def runs_of(samples: Sequence[SampleState]) -> list[EngineJobState]:
    """Returns the jobs of some samples, each once."""
    return list({sample.run.job.job_id: sample.run for sample in samples}.values())
