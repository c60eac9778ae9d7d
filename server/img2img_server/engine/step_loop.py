"""Runs one step of a batch at a time.

    pick a batch -> encode the new jobs -> one forward -> decode the finished samples

Rows join and leave at every step. The neighbours of a row change no more than the last bits of its
arithmetic. An error stays with the row that causes it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch

from img2img_server.domain.events import Stage, StageFinished
from img2img_server.engine.base import (
    RESTARTED_WARNING,
    DeviceLost,
    EngineJob,
    JobFailed,
    JobStopped,
    JobSuspended,
    PreviewReady,
    SampleReady,
    Sink,
    StateError,
)
from img2img_server.engine.denoiser import Denoiser, TextInput
from img2img_server.engine.dispatch import EventDispatcher
from img2img_server.engine.executor import BatchExecutor
from img2img_server.engine.isolation import device_works, failure_of
from img2img_server.engine.memory import MemoryModel
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.engine.rows import (
    EngineJobState,
    SampleState,
    adapters_of,
    batch_key_of,
    emit,
    largest_size,
    runs_of,
    text_of,
)
from img2img_server.engine.scheduler import Batch, Scheduler
from img2img_server.engine.suspension import load_samples, suspended
from img2img_server.errors import EngineError, JobFailedError, OutOfMemoryError
from img2img_server.telemetry import BATCH_FORWARDS

_log = logging.getLogger(__name__)


class StepLoop:
    """The jobs in the engine and their next steps. Only the thread that owns the device calls it.

    Args:
        spec: the model's name, defaults and limits.
        max_batch_size: the largest batch, in forwards; a guided sample costs two.
        memory: knows which batches fit the device.
        events: emits the events of jobs; its failures come back to `copy_failed`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        spec: ModelSpec,
        max_batch_size: int,
        memory: MemoryModel,
        events: EventDispatcher,
    ) -> None:
        self._denoiser = denoiser
        self._spec = spec
        self._events = events
        self._executor = BatchExecutor(denoiser, self._note_split)
        self._scheduler = Scheduler(max_batch_size, denoiser.fixed_step_cost)
        self._memory = memory
        self._runs: dict[int, EngineJobState] = {}
        self._lost = False  # whether the device is permanently lost
        self._batch_forwards = BATCH_FORWARDS.labels(spec.info.name)
        self._outlook = self._scheduler.copy()

    @property
    def outlook(self) -> Scheduler:
        """Returns a copy of the scheduler as it was after the last change, for other threads."""
        return self._outlook

    def _publish(self) -> None:
        self._outlook = self._scheduler.copy()

    @property
    def has_work(self) -> bool:
        return len(self._scheduler) > 0

    def cancel(self, job_id: int) -> None:
        """Ends a job; ignores unknown jobs."""
        self._end(job_id, JobStopped())

    def suspend(self, job_id: int) -> None:
        """Ends a job with its state; ignores unknown jobs."""
        run = self._runs.get(job_id)
        if run is None:
            return
        event = _unprepared_end(run.job)
        if run.is_prepared:
            try:
                if key := self._state_key(run):
                    event = suspended(run, key)
                else:
                    _log.warning("job_state_not_saved: job %d: its files have changed", job_id)
            except Exception:  # The device may be lost. Another worker starts the job again.
                event = JobStopped()
                _log.exception("job_state_not_saved: job %d", job_id)
        self._end(job_id, event)

    def stop_all(self) -> None:
        """Ends every job. Jobs that have not continued from their states keep them."""
        for job_id, run in list(self._runs.items()):
            self._end(job_id, JobStopped() if run.is_prepared else _unprepared_end(run.job))

    def set_loras(self, names: tuple[str, ...]) -> None:
        """Sets the LoRAs that jobs may name. Drops encoded prompts, because they keep the
        contents of replaced files in memory.
        """
        self._spec = replace(self._spec, loras=names)
        self._denoiser.clear_cache()

    def clear_cache(self) -> None:
        """Drops encoded prompts and cached memory."""
        self._executor.clear_cache()

    def warm_up(
        self,
        height: int,
        width: int,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Runs every operation once at this size, with every batch size that is compiled.

        Args:
            turn: Returns the context of a turn on the device; each batch size gets one.
        """
        for forwards in self._denoiser.warm_up_forwards:
            with turn():
                self._warm_up(height, width, forwards)

    def _warm_up(self, height: int, width: int, forwards: int) -> None:
        denoiser = self._denoiser
        texts = [
            TextInput(
                prompt=prompt, negative_prompt="", guidance_scale=0.0, height=height, width=width
            )
            for prompt in denoiser.warm_up_prompts
        ]
        first, *others = denoiser.encode_texts(texts)
        batches = [[each] * forwards for each in (first, *others)]
        batches += [list(islice(cycle((each, first)), forwards)) for each in others]
        images = [np.zeros((height, width, 3), np.uint8)]
        images *= min(forwards, denoiser.max_vae_batch(height, width))
        latents = torch.stack([image.mean for image in denoiser.encode_images(images)])
        rows = [latents[:1]] * forwards
        timesteps = torch.full((forwards,), 500.0, device=denoiser.device)
        for batch in batches * denoiser.warm_up_calls:
            with self._memory.measured(height, width, forwards):
                outputs = denoiser.denoise(rows, timesteps, batch)
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise EngineError("the output of its denoiser has values that are not finite")
        for image in denoiser.decode(latents):
            image.pixels()  # It raises for values that are not finite.
        denoiser.preview(latents[:1])

    def begin(self, job: EngineJob, sink: Sink) -> None:
        """Adds a job, or ends it at once: if it is invalid, has no steps, or the device is lost."""
        if self._lost:
            emit(sink, job, _unprepared_end(job))
            return
        try:
            if job.job_id in self._runs:
                raise EngineError("the job runs here already")
            run = admit(job, sink, self._denoiser, self._spec, self._memory)
        except Exception as error:
            if not isinstance(error, JobFailedError) and self._loses_device(error):
                emit(sink, job, DeviceLost(error))
                self.stop_all()
                return
            _log.exception("job_cannot_start: job %d", job.job_id)
            emit(sink, job, JobFailed(failure_of(error, job)))
            return
        if not run.schedule.steps:
            now = time.monotonic()
            run.note_encode(now, now, 1.0)
            for index in job.indices:
                self._events.emit(run, SampleReady(index, job.init_image.copy()))
            self._events.finish(run)
            return
        self._resume(run)
        self._runs[job.job_id] = run
        now = time.monotonic()
        for row in run.rows(now):
            self._scheduler.add(row, now)
        self._publish()

    def _resume(self, run: EngineJobState) -> None:
        """Makes a job continue from its state, if it has one that can be used."""
        if run.job.state is None:
            return
        try:
            samples = load_samples(run, run.job.state, self._state_key(run))
        except StateError as error:
            _log.warning("job_state_unusable: job %d: %s", run.job.job_id, error)
            run.warnings = (RESTARTED_WARNING,)
        else:
            run.resume(run.job.state, samples)

    def _state_key(self, run: EngineJobState) -> str:
        """Returns the key of the state of a job; empty if a file of its LoRAs, or one of the
        embeddings, has changed since it began, so that no engine with the present files computes
        the same steps.
        """
        key = self._denoiser.state_key  # Before the comparison: the files may change in between.
        if run.embeddings != self._denoiser.current_embeddings:
            return ""
        return key if adapters_of(run.job, self._denoiser) == run.adapters else ""

    def copy_failed(self, run: EngineJobState, error: Exception) -> None:
        """Ends a job with an image that could not be copied to the host."""
        if self._runs.get(run.job.job_id) is run:
            del self._runs[run.job.job_id]
            self._scheduler.cancel(run.job.job_id)
            self._publish()
        self._events.emit_final_event(run, self._final_event(run, error))
        if self._lost:
            self.stop_all()

    def _end(self, job_id: int, event: JobStopped | JobSuspended | JobFailed | DeviceLost) -> None:
        if run := self._runs.pop(job_id, None):
            self._scheduler.cancel(job_id)
            self._publish()
            self._events.emit(run, event)

    def _fail(self, run: EngineJobState, error: Exception) -> None:
        if run.job.job_id in self._runs:
            self._end(run.job.job_id, self._final_event(run, error))

    def _final_event(self, run: EngineJobState, error: Exception) -> JobFailed | DeviceLost:
        if self._loses_device(error):
            return DeviceLost(error)
        _log.error("job_failed: job %d", run.job.job_id, exc_info=error)
        return JobFailed(failure_of(error, run.job))

    def _loses_device(self, error: Exception) -> bool:
        """Checks the device after an error; returns whether it is lost."""
        if not device_works(self._denoiser.device):
            _log.critical("device_lost", exc_info=error)
            self._lost = True
        return self._lost

    def run_batch(self) -> None:
        """Runs the next step of the batch that the scheduler picks. Never raises."""
        batch = self._scheduler.next_batch(time.monotonic())
        self._publish()
        if batch is None:
            return
        try:
            batch = self._fitting(batch)
            self._run_batch(batch)
        except Exception as error:
            for row in batch.rows:
                if run := self._runs.get(row.job_id):
                    self._fail(run, error)
        if self._lost:  # The other jobs are requeued and run on other workers.
            self.stop_all()

    def _fitting(self, batch: Batch) -> Batch:
        """Returns the rows that fit the device, at least one. The others wait for a later step."""
        most = self._memory.max_forwards(
            *batch.size, batch.forwards, self._denoiser.padded_batch_size
        )
        rows = list(batch.rows)
        while len(rows) > 1 and sum(row.forwards for row in rows) > most:
            self._scheduler.put_back([rows.pop().key])
        return Batch(tuple(rows))

    def _run_batch(self, batch: Batch) -> None:
        runs = {row.job_id: self._runs[row.job_id] for row in batch.rows}
        new = [run for run in runs.values() if not run.is_prepared]
        most = self._denoiser.max_vae_batch(*batch.size)
        if len(new) > most:
            self._executor.prefetch_prompts(new)
        # Running jobs must not wait until the init images of all new jobs are encoded.
        self._encode(new[:most])
        late = {run.job.job_id for run in new[most:]}
        self._scheduler.put_back([row.key for row in batch.rows if row.job_id in late])
        rows = [row for row in batch.rows if row.job_id in self._runs.keys() - late]
        samples = [self._runs[row.job_id].sample(row.sample) for row in rows]
        self._step(samples)
        finished = set(self._scheduler.complete([row.key for row in rows], time.monotonic()))
        self._publish()
        self._report_steps([sample for sample in samples if self._is_alive(sample)])
        done = [sample for sample in samples if sample.key in finished]
        for start in range(0, len(done), most):
            self._decode(done[start : start + most])

    def _is_alive(self, sample: SampleState) -> bool:
        return sample.run.job.job_id in self._runs

    def _encode(self, runs: Sequence[EngineJobState]) -> None:
        if not runs:
            return
        began = time.monotonic()
        failed = self._executor.encode(runs)
        for run in runs:
            run.note_encode(began, time.monotonic(), 1 / len(runs))
            if run.is_prepared and not run.resumed:
                self._events.emit(run, StageFinished(stage=Stage.TEXT_ENCODED))
                self._events.emit(run, StageFinished(stage=Stage.IMAGE_ENCODED))
        for run, error in failed:
            self._fail(run, error)

    def _step(self, samples: Sequence[SampleState]) -> None:
        if not samples:
            return
        began = time.monotonic()
        forwards, size = sum(sample.run.forwards for sample in samples), largest_size(samples)
        with self._memory.measured(*size, self._denoiser.padded_batch_size(forwards)):
            failed = self._executor.step(samples)
        self._batch_forwards.observe(forwards)
        ended = time.monotonic()
        for run in runs_of(samples):
            own = sum(run.forwards for sample in samples if sample.run is run)
            run.note_step(began, ended, own / forwards)
        for sample, error in failed:
            self._fail(sample.run, error)

    def _note_split(self, samples: Sequence[SampleState]) -> None:
        """Limits later batches of this size after an out-of-memory error."""
        height, width = largest_size(samples)
        forwards = sum(sample.run.forwards for sample in samples)
        self._scheduler.limit(height, width, forwards // 2, time.monotonic())
        _log.warning("out_of_device_memory: %d forwards of %dx%d", forwards, width, height)

    def _report_steps(self, samples: Sequence[SampleState]) -> None:
        for sample in samples:
            self._events.emit(sample.run, sample.step_done())
        previews, failed = self._executor.preview([s for s in samples if s.wants_preview])
        for sample, image in previews:
            event = partial(PreviewReady, sample.index, sample.steps_done)
            self._events.emit_image(sample.run, image, event, is_optional=True)
        for sample, error in failed:
            # A preview is optional: the job continues.
            _log.warning("preview_failed: job %d", sample.run.job.job_id, exc_info=error)

    def _decode(self, samples: Sequence[SampleState]) -> None:
        if not samples:
            return
        began = time.monotonic()
        together = Counter(sample.run.job.job_id for sample in samples)
        images, failed = self._executor.decode(samples)
        for sample, error in failed:
            self._fail(sample.run, error)
        for sample, image in images:
            if self._is_alive(sample):
                share = together[sample.run.job.job_id] / len(samples)
                self._events.emit_image(sample.run, image, partial(sample.ready, began, share))
                sample.run.unfinished -= 1
                if not sample.run.unfinished:
                    del self._runs[sample.run.job.job_id]
                    self._events.finish(sample.run)


def _unprepared_end(job: EngineJob) -> JobStopped | JobSuspended:
    """Returns the last event of a job that ends before it runs here: with the state that it has."""
    return JobSuspended(state=job.state) if job.state else JobStopped()


def admit(
    job: EngineJob, sink: Sink, denoiser: Denoiser, spec: ModelSpec, memory: MemoryModel
) -> EngineJobState:
    """Returns the state of a job that may begin.

    Raises:
        EngineError: the model does not support the request.
        OutOfMemoryError: the job can never fit the device.
        ValueError: the scheduler cannot run this number of steps.
        Exception: An error of a broken device.
    """
    params = job.params
    if sentence := spec.refusal(job.height, job.width, params.num_inference_steps):
        raise EngineError(sentence)
    for lora in params.loras:
        if lora.name not in spec.loras:
            raise EngineError(f"{spec.name} has no LoRA {lora.name}")
    adapters = adapters_of(job, denoiser)
    text = text_of(job, adapters)
    forwards = denoiser.forwards(text)
    if need := memory.lasting_shortfall(job.height, job.width, forwards):
        raise OutOfMemoryError(job.width, job.height, need)
    schedule = denoiser.schedule(
        params.scheduler,
        params.num_inference_steps,
        params.strength,
        job.height,
        job.width,
        params.strength_mode,
    )
    return EngineJobState.begin(
        job,
        sink,
        schedule,
        forwards,
        denoiser.device,
        batch_key_of(text, denoiser),
        adapters,
        denoiser.current_embeddings,
    )
