"""The step loop's work: every call runs one step of all the rows that share it.

    pick a batch -> encode what is new -> one forward -> decode what is done

Rows join and leave at every step. What a row's neighbours are changes no more than the last bits
of its arithmetic. An error stays with the row that causes it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from img2img_server.domain.events import Stage
from img2img_server.engine.base import (
    DeviceLost,
    EngineJob,
    JobDone,
    JobError,
    JobStopped,
    PreviewReady,
    SampleReady,
    Sink,
    StageDone,
    StepDone,
)
from img2img_server.engine.denoiser import Denoiser
from img2img_server.engine.isolation import device_works, failure_of
from img2img_server.engine.memory import Memory
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.engine.runs import Run, Sample, emit, runs_of
from img2img_server.engine.scheduler import Batch, Scheduler
from img2img_server.engine.stages import Stages
from img2img_server.engine.warm_up import exercise
from img2img_server.errors import EngineError, JobFailedError, OutOfMemoryError

_log = logging.getLogger(__name__)


class StepLoop:
    """The jobs in the engine and their next steps. For one thread, the one that owns the device.

    Args:
        spec: the model's name, defaults and limits.
        capacity_rows: most forwards of a batch; a guided sample takes two of them.
        memory: knows which batches fit the device.
    """

    def __init__(
        self, denoiser: Denoiser, spec: ModelSpec, capacity_rows: int, memory: Memory
    ) -> None:
        self._denoiser = denoiser
        self._spec = spec
        self._stages = Stages(denoiser, self._note_split)
        self._scheduler = Scheduler(capacity_rows, denoiser.step_overhead)
        self._memory = memory
        self._runs: dict[int, Run] = {}
        self._lost = False  # the device, for good

    @property
    def has_work(self) -> bool:
        return len(self._scheduler) > 0

    def cancel(self, job_id: int) -> None:
        """Ends a job; nothing happens when there is no such one."""
        self._end(job_id, JobStopped())

    def stop_all(self) -> None:
        """Ends every job."""
        for job_id in list(self._runs):
            self.cancel(job_id)

    def clear_cache(self) -> None:
        """Forgets what is kept for speed only."""
        self._stages.clear_cache()

    def warm_up(self, height: int, width: int) -> None:
        """Runs everything once at this size, with every size of batch that is worth it."""
        for slots in self._denoiser.warm_up_slots:
            exercise(self._denoiser, self._memory, height, width, slots)

    def begin(self, job: EngineJob, sink: Sink) -> None:
        """Takes a job in, or ends it at once: refused, with nothing to do, or on a lost device."""
        if self._lost:
            emit(sink, job, JobStopped())
            return
        denoiser = self._denoiser
        try:
            if job.job_id in self._runs:
                raise EngineError("the job runs here already")
            if sentence := self._spec.refusal(job.height, job.width, job.num_inference_steps):
                raise EngineError(sentence)
            if job.lora and job.lora not in self._spec.loras:
                raise EngineError(f"{self._spec.name} has no LoRA {job.lora}")
            slots = denoiser.slots(job.guidance_scale)
            if need := self._memory.lacking(job.height, job.width, slots):
                raise OutOfMemoryError(job.width, job.height, need)
            schedule = denoiser.schedule(job.scheduler, job.num_inference_steps, job.strength)
            run = Run.begin(job, sink, schedule, slots, denoiser.device)
        except Exception as error:
            if not isinstance(error, JobFailedError) and self._loses_device(error):
                emit(sink, job, DeviceLost(error))
                self.stop_all()
                return
            _log.exception("job %d cannot begin", job.job_id)
            emit(sink, job, JobError(failure_of(error, job)))
            return
        if not schedule.steps:
            for index in range(len(job.seeds)):
                run.emit(SampleReady(index, job.init_image.copy()))
            run.emit(JobDone(run.timings(time.monotonic())))
            return
        self._runs[job.job_id] = run
        now = time.monotonic()
        for row in run.rows(now):
            self._scheduler.add(row, now)

    def _end(self, job_id: int, event: JobDone | JobStopped | JobError | DeviceLost) -> None:
        run = self._runs.pop(job_id, None)
        if run is not None:
            self._scheduler.cancel(job_id)
            run.emit(event)

    def _fail(self, run: Run, error: Exception) -> None:
        if run.job.job_id not in self._runs:
            return
        if self._loses_device(error):
            self._end(run.job.job_id, DeviceLost(error))
            return
        _log.error("job %d failed", run.job.job_id, exc_info=error)
        self._end(run.job.job_id, JobError(failure_of(error, run.job)))

    def _loses_device(self, error: Exception) -> bool:
        """Asks the device after an error, and notes when it broke for good."""
        if not device_works(self._denoiser.device):
            _log.critical("the device is lost", exc_info=error)
            self._lost = True
        return self._lost

    def run_batch(self) -> None:
        """Runs the next step of what the scheduler picks. Raises nothing, whatever happens."""
        batch = self._scheduler.next_batch(time.monotonic())
        if batch is None:
            return
        try:
            self._run_batch(self._fitting(batch))
        except Exception as error:
            for row in batch.rows:
                if run := self._runs.get(row.job_id):
                    self._fail(run, error)
        if self._lost:  # the neighbours did nothing wrong
            self.stop_all()

    def _fitting(self, batch: Batch) -> Batch:
        """What of a batch fits the device; the rest goes back to wait. One row at least."""
        first = batch.rows[0]
        most = self._memory.slots_that_fit(first.height, first.width, batch.slots)
        rows = list(batch.rows)
        while len(rows) > 1 and sum(row.slots for row in rows) > most:
            self._scheduler.put_back([rows.pop().key])
        return Batch(tuple(rows))

    def _run_batch(self, batch: Batch) -> None:
        runs = {row.job_id: self._runs[row.job_id] for row in batch.rows}
        new = [run for run in runs.values() if not run.is_prepared]
        first = batch.rows[0]
        most = self._denoiser.pictures_at_once(first.height, first.width)
        # Those that run already do not wait until all new ones are encoded.
        self._encode(new[:most])
        late = {run.job.job_id for run in new[most:]}
        self._scheduler.put_back([row.key for row in batch.rows if row.job_id in late])
        rows = [row for row in batch.rows if row.job_id in self._runs.keys() - late]
        samples = [self._runs[row.job_id].samples[row.sample] for row in rows]
        self._step(samples)
        finished = set(self._scheduler.complete([row.key for row in rows], time.monotonic()))
        self._report_steps([sample for sample in samples if self._is_alive(sample)])
        done = [sample for sample in samples if sample.key in finished]
        for start in range(0, len(done), most):
            self._decode(done[start : start + most])

    def _is_alive(self, sample: Sample) -> bool:
        return sample.run.job.job_id in self._runs

    def _encode(self, runs: Sequence[Run]) -> None:
        if not runs:
            return
        began = time.monotonic()
        failed = self._stages.encode(runs)
        for run in runs:
            run.started, run.encode = began, time.monotonic() - began
            if run.is_prepared:
                run.emit(StageDone(Stage.TEXT_ENCODED))
                run.emit(StageDone(Stage.IMAGE_ENCODED))
        for run, error in failed:
            self._fail(run, error)

    def _step(self, samples: Sequence[Sample]) -> None:
        if not samples:
            return
        began = time.monotonic()
        slots, job = sum(sample.run.slots for sample in samples), samples[0].run.job
        with self._memory.measured(job.height, job.width, slots):
            failed = self._stages.step(samples)
        took = time.monotonic() - began
        for run in runs_of(samples):
            own = sum(run.slots for sample in samples if sample.run is run)
            run.note_step(took, own / slots)
        for sample, error in failed:
            self._fail(sample.run, error)

    def _note_split(self, samples: Sequence[Sample]) -> None:
        """Learns from an out-of-memory: later batches of that size are smaller from the start."""
        job = samples[0].run.job
        slots = sum(sample.run.slots for sample in samples)
        self._scheduler.limit(job.height, job.width, slots // 2)
        _log.warning("%d forwards of %dx%d do not fit the device", slots, job.width, job.height)

    def _report_steps(self, samples: Sequence[Sample]) -> None:
        wanted = []
        for sample in samples:
            run, step, total = sample.run, sample.steps_done, len(sample.run.schedule.steps)
            sigma = run.schedule.steps[step - 1].sigma_after
            run.emit(StepDone(sample.index, step, total, sigma))
            every = run.job.preview_interval_steps
            if every and step % every == 0 and step < total:
                wanted.append(sample)
        previews, failed = self._stages.preview(wanted)
        for sample, pixels in previews:
            sample.run.emit(PreviewReady(sample.index, sample.steps_done, pixels))
        for sample, error in failed:
            # A job can do without its previews.
            _log.warning("a preview of job %d failed", sample.run.job.job_id, exc_info=error)

    def _decode(self, samples: Sequence[Sample]) -> None:
        if not samples:
            return
        began = time.monotonic()
        pictures, failed = self._stages.decode(samples)
        for run in runs_of(samples):
            run.decode += time.monotonic() - began
        for sample, error in failed:
            self._fail(sample.run, error)
        for sample, pixels in pictures:
            run = sample.run
            if self._is_alive(sample):
                run.emit(SampleReady(sample.index, pixels))
                run.unfinished -= 1
                if not run.unfinished:
                    self._end(run.job.job_id, JobDone(run.timings(time.monotonic())))
