"""An engine and a safety checker without models, for tests of the code around them."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from img2img_server.domain.events import Stage, StageFinished, StepFinished
from img2img_server.domain.job import Determinism, Timings
from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import JobParams, Lane
from img2img_server.domain.stages import Span
from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.base import (
    DeviceLost,
    EngineEvent,
    EngineJob,
    JobDone,
    JobFailed,
    JobPlan,
    JobState,
    JobStopped,
    JobSuspended,
    PreviewReady,
    SampleReady,
    Sink,
    cut_warning,
)
from img2img_server.errors import EngineError
from img2img_server.imaging.base import Pixels

_log = logging.getLogger(__name__)

FAKE_MODEL = ModelInfo(
    name="fake",
    family="fake",
    schedulers=("ddim", "euler"),
    default_num_inference_steps=4,
    default_guidance_scale=1.0,
)
# A job fails if its prompt begins with this text; the rest of the prompt is the message.
FAIL_PROMPT = "fail:"
# A job whose prompt begins with this text runs until it is cancelled.
HOLD_PROMPT = "hold:"


@dataclass
class _Run:
    job: EngineJob
    sink: Sink
    total: int
    began: float = 0.0
    step: int = 0
    first: int = 0  # the step at which it began here
    cancelled: bool = field(default=False)
    is_suspended: bool = False  # It was cancelled by `suspend`.


class FakeEngine:
    """Runs every submitted job at once, one step of each in turn.

    Its images depend on the same parameters as those of a real engine, and on nothing else. A
    prompt that begins with "fail:" fails with EngineError after its first stage, and one that
    begins with "hold:" runs until it is cancelled.

    Args:
        model: the value of the property `model`.
        step_seconds: the length of a step.
        hold_after: every job waits after this many steps until `release` is called.
        max_batch_size: the value of the property; larger batches run as well.
        state_key: the value of the property.
        max_prompt_words: the number of words of a prompt that it reads; it warns about the others.
    """

    def __init__(
        self,
        model: ModelInfo = FAKE_MODEL,
        *,
        step_seconds: float = 0.0,
        hold_after: int | None = None,
        max_batch_size: int = 8,
        max_prompt_words: int = 2000,
        state_key: str = "fake",
    ) -> None:
        self._model = model
        self._step_seconds = step_seconds
        self._hold_after = hold_after
        self._max_batch_size = max_batch_size
        self._state_key = state_key
        self._max_prompt_words = max_prompt_words
        self._changed = threading.Condition()
        self._waiting: deque[_Run] = deque()
        self._running: list[_Run] = []
        self._stopping = False
        self._lost = False
        self._busy_seconds = 0.0
        self.caches_cleared = 0
        self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
        self._thread.start()

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def device(self) -> str:
        return "fake"

    @property
    def determinism(self) -> Determinism:
        return Determinism.EXACT

    @property
    def max_batch_size(self) -> int:
        return self._max_batch_size

    def submit(self, job: EngineJob, sink: Sink) -> None:
        with self._changed:
            if self._stopping:
                raise EngineError("the engine is stopped")
            total = StrengthRule.FLOOR.denoising_steps(
                job.params.strength, job.params.num_inference_steps
            )
            run = _Run(job, sink, total)
            if job.state and job.state.state_key == self.state_key:
                run.step = run.first = job.state.steps[job.indices[0]]
            self._waiting.append(run)
            self._changed.notify_all()

    def next_jobs(self, plans: Sequence[JobPlan]) -> Collection[int]:
        with self._changed:
            found = {run.job.job_id: run.job.params for run in (*self._waiting, *self._running)}
        forwards = sum(self._forwards(params) for params in found.values())
        for plan in sorted(plans, key=lambda plan: plan.params.lane is Lane.BATCH):
            forwards += self._forwards(plan.params)
            if plan.job_id not in found and found and forwards > self._max_batch_size:
                break
            found[plan.job_id] = plan.params
        return found.keys()

    def _forwards(self, params: JobParams) -> int:
        return params.samples * self._model.forwards(params)

    @property
    def state_key(self) -> str:
        return self._state_key

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds

    def clear_cache(self) -> None:
        self.caches_cleared += 1

    def cancel(self, job_id: int) -> None:
        with self._changed:
            for run in (*self._waiting, *self._running):
                run.cancelled |= run.job.job_id == job_id
            self._changed.notify_all()

    def suspend(self, job_id: int) -> None:
        with self._changed:
            for run in (*self._waiting, *self._running):
                if run.job.job_id == job_id and not run.cancelled:
                    run.cancelled = run.is_suspended = True
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def lose_device(self) -> None:
        """Simulates a permanent failure of the device: running jobs end with DeviceLost, new ones
        with JobStopped.
        """
        with self._changed:
            self._lost = True
            self._changed.notify_all()

    def release(self) -> None:
        """Lets held jobs continue. Later jobs are not held."""
        with self._changed:
            self._hold_after = None
            self._changed.notify_all()

    def _loop(self) -> None:
        while runs := self._next_runs():
            began = time.monotonic()
            for run in runs:
                if self._advance(run):
                    self._running.remove(run)
            self._busy_seconds += max(self._step_seconds, time.monotonic() - began)
        for run in (*self._running, *self._waiting):
            _emit(run, JobStopped())

    def _next_runs(self) -> list[_Run]:
        """Waits as long as a step takes, then until jobs can continue, and returns these jobs.

        Returns an empty list when the engine stops.
        """
        with self._changed:
            if any(run.step for run in self._running):
                self._changed.wait_for(self._is_interrupted, timeout=self._step_seconds)
            while not self._stopping:
                while self._waiting:
                    self._running.append(self._waiting.popleft())
                if runs := self._movable():
                    return runs
                self._changed.wait()
            return []

    def _is_interrupted(self) -> bool:
        return self._stopping or any(run.cancelled for run in self._running)

    def _movable(self) -> list[_Run]:
        if self._lost:
            return list(self._running)
        return [run for run in self._running if run.cancelled or not self._is_held(run)]

    def _is_held(self, run: _Run) -> bool:
        if run.step and run.job.params.prompt.startswith(HOLD_PROMPT):
            return True
        return self._hold_after is not None and run.step >= self._hold_after

    def _advance(self, run: _Run) -> bool:
        """Runs one step of every sample; returns whether the job has ended."""
        job = run.job
        if run.is_suspended and not run.began and job.state:
            return _emit(run, JobSuspended(state=job.state))
        if run.is_suspended and run.began and run.step < run.total:
            return _emit(run, self._suspended(run))
        if run.cancelled or (self._lost and not run.step):
            return _emit(run, JobStopped())
        if self._lost:
            return _emit(run, DeviceLost(RuntimeError("CUDA error: an illegal address")))
        if not run.began:
            run.began = time.monotonic()
            if run.total and not run.first:
                _emit(run, StageFinished(stage=Stage.TEXT_ENCODED))
            if job.params.prompt.startswith(FAIL_PROMPT):
                message = job.params.prompt.removeprefix(FAIL_PROMPT)
                return _emit(run, JobFailed(EngineError(message)))
            if run.total and not run.first:
                _emit(run, StageFinished(stage=Stage.IMAGE_ENCODED))
        if run.step < run.total:
            run.step += 1
            self._step(run)
        if run.step < run.total:
            return False
        for sample in job.indices:
            _emit(run, SampleReady(sample, fake_image(job, sample)))
        took = time.monotonic() - run.began
        steps = run.total * len(job.indices)
        timings = Timings(denoise=took, engine=took, steps=steps, batch_share=1.0)
        warnings = self._warnings(job) if run.total else ()
        share = job.params.strength if run.total else 0.0
        spans = (Span("denoise", run.began, run.began + took),)
        used = took + (job.state.device_seconds if job.state else 0.0)
        return _emit(run, JobDone(timings, warnings, run.total, share, used, spans))

    def _suspended(self, run: _Run) -> JobSuspended:
        took = time.monotonic() - run.began
        state = JobState(
            state_key=self.state_key,
            job_id=run.job.job_id,
            tenant=run.job.tenant,
            steps=dict.fromkeys(run.job.indices, run.step),
            total=run.total,
            tensors=b"",
            device_seconds=took + (run.job.state.device_seconds if run.job.state else 0.0),
        )
        span = Span("denoise", run.began, run.began + took)
        return JobSuspended(state=state, spans=(span,), engine_seconds=took)

    def _warnings(self, job: EngineJob) -> tuple[str, ...]:
        texts = {"prompt": job.params.prompt}
        if job.params.guidance_scale > 1:
            texts["negative prompt"] = job.params.negative_prompt
        most = self._max_prompt_words
        return tuple(
            cut_warning(name, most, len(words), " ".join(words[most:]))
            for name, words in ((name, text.split()) for name, text in texts.items())
            if len(words) > most
        )

    def _step(self, run: _Run) -> None:
        job, step = run.job, run.step
        for sample in job.indices:
            _emit(
                run,
                StepFinished(
                    sample=sample, step=step, total=run.total, sigma=float(run.total - step)
                ),
            )
            every = job.params.preview_interval_steps
            if every and step % every == 0 and step < run.total:
                stride = -(-max(job.height, job.width) // 256)
                preview = np.ascontiguousarray(job.init_image[::stride, ::stride])
                _emit(run, PreviewReady(sample, step, preview))


def fake_image(job: EngineJob, sample: int) -> Pixels:
    """Returns the image of one sample: the init image mixed with noise, by strength."""
    total = _steps_of(job)
    if total == 0:
        return job.init_image.copy()
    recipe: tuple[object, ...] = (
        job.params.prompt,
        job.params.negative_prompt,
        job.seeds[sample],
        job.params.num_inference_steps,
        job.params.guidance_scale,
        job.params.scheduler,
    )
    if job.params.loras:
        recipe += tuple(sorted((lora.name, lora.scale) for lora in job.params.loras))
    digest = hashlib.sha256(repr(recipe).encode()).digest()
    noise = np.random.default_rng(list(digest)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    rows = np.arange(job.height) * 16 // job.height
    columns = np.arange(job.width) * 16 // job.width
    share = total / job.params.num_inference_steps
    mixed = job.init_image * (1 - share) + noise[rows][:, columns] * share
    return np.asarray(mixed.round(), dtype=np.uint8)


def _emit(run: _Run, event: EngineEvent) -> bool:
    try:
        run.sink(event)
    except Exception:
        _log.exception("event_sink_failed: job %d", run.job.job_id)
    return isinstance(event, JobDone | JobStopped | JobSuspended | JobFailed | DeviceLost)


def _steps_of(job: EngineJob) -> int:
    params = job.params
    return StrengthRule.FLOOR.denoising_steps(params.strength, params.num_inference_steps)


class FixedSafetyChecker:
    """Gives every image the same score; with 0.0 no image is unsafe."""

    def __init__(self, score: float) -> None:
        self._score = score
        self.turn = nullcontext()

    async def warm_up(self) -> None:
        """Loads nothing."""

    def check(self, pixels: Pixels) -> float:
        return self._score
