"""The engine: one thread owns the device. Other threads queue calls, which it makes between steps.

A second thread waits for images that are copied from the device, see dispatch.py.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from img2img_server.default_dtype import DEFAULT_DTYPE
from img2img_server.domain.job import Determinism
from img2img_server.domain.models import ModelInfo
from img2img_server.engine.base import EngineJob, JobPlan, Sink
from img2img_server.engine.denoiser import Denoiser
from img2img_server.engine.device_memory import watch_memory
from img2img_server.engine.dispatch import EventDispatcher
from img2img_server.engine.memory import MemoryModel, probe_of
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.engine.rows import EngineJobState, adapters_of, batch_key_of, rows_of, text_of
from img2img_server.engine.scheduler import Row
from img2img_server.engine.step_loop import StepLoop
from img2img_server.engine.turns import DeviceTurns
from img2img_server.errors import EngineError
from img2img_server.telemetry import DEVICE_BUSY_SECONDS, MAX_BATCH_SIZE

_log = logging.getLogger(__name__)

LORA_WATCH_SECONDS = 2.0
WATCHER_JOIN_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Offered:
    """The names of the files of a folder that are offered.

    Attributes:
        refused: The names of others, each with the reason.
    """

    names: tuple[str, ...]
    refused: tuple[tuple[str, str], ...] = ()


class DiffusionEngine:
    """The Engine of base.py on a Denoiser. Its thread starts at once.

    Args:
        spec: the model's name, defaults and limits.
        max_batch_size: the largest batch, in forwards; a guided sample costs two.
        memory: the memory model of the device; None: a new one.
        new_loras: reads the folder of LoRAs again and returns them, or None if nothing has
            changed; called again and again on a thread of its own. None: the LoRAs never change.
        new_embeddings: the same for textual inversion embeddings.
        turns: the turns of the device, if it has more than one engine.

    Attributes:
        weights_bytes: the memory of the weights on the device; 0: not known.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        spec: ModelSpec,
        max_batch_size: int,
        memory: MemoryModel | None = None,
        new_loras: Callable[[], Offered | None] | None = None,
        new_embeddings: Callable[[], Offered | None] | None = None,
        *,
        turns: DeviceTurns | None = None,
        weights_bytes: int = 0,
    ) -> None:
        self._denoiser = denoiser
        self._spec = spec
        self._max_batch_size = max_batch_size
        self._turns = turns or DeviceTurns()
        self.weights_bytes = weights_bytes
        memory = memory or MemoryModel(probe_of(denoiser.device), turns=self._turns)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._events = EventDispatcher(self._on_copy_failed)
        self._loop = StepLoop(denoiser, spec, max_batch_size, memory, self._events)
        self._lock = threading.Lock()
        self._arriving: dict[int, JobPlan] = {}  # submitted jobs that the step loop has not added
        self._stopping = False
        self._busy_seconds = 0.0
        MAX_BATCH_SIZE.labels(spec.info.name).set(max_batch_size)
        watch_memory(denoiser.device)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._watch_ended = threading.Event()
        self._watcher: threading.Thread | None = None
        watched = {"lora": new_loras, "embedding": new_embeddings}
        readers = {kind: read for kind, read in watched.items() if read is not None}
        if readers:
            watch = partial(self._watch_folders, readers)
            self._watcher = threading.Thread(target=watch, name="engine-loras", daemon=True)
            self._watcher.start()

    def _watch_folders(self, readers: Mapping[str, Callable[[], Offered | None]]) -> None:
        while not self._watch_ended.wait(LORA_WATCH_SECONDS):
            for kind, read in readers.items():
                try:
                    found = read()
                except Exception:  # The next try may succeed.
                    _log.exception("%s_dir_not_read", kind)
                    continue
                if found is not None:
                    _log.info("%ss_changed: %s", kind, ", ".join(found.names) or "none")
                    self._offer(kind, found)

    def _offer(self, kind: str, found: Offered) -> None:
        if kind == "lora":
            self._spec = replace(self._spec, loras=found.names, refused_loras=found.refused)
            self._calls.put(partial(self._loop.set_loras, found.names))
        else:  # The denoiser reads them with the next prompt.
            self._spec = replace(self._spec, embeddings=found.names)

    @property
    def model(self) -> ModelInfo:
        return self._spec.info

    @property
    def device(self) -> str:
        return self._denoiser.device_name

    @property
    def determinism(self) -> Determinism:
        return self._denoiser.determinism

    @property
    def state_key(self) -> str:
        return self._denoiser.state_key

    @property
    def max_batch_size(self) -> int:
        return self._max_batch_size

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds

    def submit(self, job: EngineJob, sink: Sink) -> None:
        with self._lock:
            if self._stopping:
                raise EngineError("the engine is stopped")
            self._arriving[job.job_id] = job
            self._calls.put(partial(self._begin, job, sink))

    def _begin(self, job: EngineJob, sink: Sink) -> None:
        self._loop.begin(job, sink)
        with self._lock:
            self._arriving.pop(job.job_id, None)

    def next_jobs(self, plans: Sequence[JobPlan]) -> Collection[int]:
        with self._lock:
            jobs = {plan.job_id: plan for plan in (*plans, *self._arriving.values())}
        now = time.monotonic()
        rows = [row for job in jobs.values() for row in self._rows(job, now)]
        without_steps = jobs.keys() - {row.job_id for row in rows}
        return self._loop.outlook.next_jobs(rows, now) | without_steps

    def _rows(self, job: JobPlan, now: float) -> list[Row]:
        """Returns the rows that a job will have; none if no step runs."""
        params, text = job.params, text_of(job, adapters_of(job, self._denoiser))
        steps = self.model.denoising_steps(params)
        if not steps:
            return []
        forwards, key = self._denoiser.forwards(text), batch_key_of(text, self._denoiser)
        return rows_of(job, forwards, steps, key, now)

    def cancel(self, job_id: int) -> None:
        self._calls.put(partial(self._loop.cancel, job_id))

    def suspend(self, job_id: int) -> None:
        self._calls.put(partial(self._loop.suspend, job_id))

    def clear_cache(self) -> None:
        self._calls.put(self._clear_cache)

    def warm_up(self, height: int, width: int) -> None:
        """Runs every operation once at this size. Blocks, for minutes if models are compiled.

        It runs on the engine's thread, because CUDA graphs belong to the thread that captured them.

        Raises:
            Exception: the error of the model.
        """
        done: Future[None] = Future()
        self._calls.put(partial(self._warm_up, height, width, done))
        done.result()

    def stop(self) -> None:
        self._watch_ended.set()
        with self._lock:
            self._stopping = True
            self._calls.put(None)
        self._thread.join()
        if self._watcher:  # It may be reading a large file.
            self._watcher.join(WATCHER_JOIN_SECONDS)

    def _on_copy_failed(self, run: EngineJobState, error: Exception) -> None:
        self._calls.put(partial(self._loop.copy_failed, run, error))

    def _run(self) -> None:
        device = self._denoiser.device
        if device.type == "cuda" and device.index is not None:
            # Events and streams belong to the thread's current device.
            torch.cuda.set_device(device)
        busy = DEVICE_BUSY_SECONDS.labels(self._spec.info.name)
        with torch.inference_mode():
            while self._make_calls():
                with self._turn():
                    began = time.monotonic()
                    self._loop.run_batch()
                    seconds = time.monotonic() - began
                self._busy_seconds += seconds
                busy.inc(seconds)
        self._loop.stop_all()
        self._events.close()
        while not self._calls.empty():  # copies that have failed since the last step
            if call := self._calls.get():
                call()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Waits for a turn on the device in which no load of another model affects the results."""
        with self._turns.turn(), DEFAULT_DTYPE.normal():
            yield

    def _make_calls(self) -> bool:
        """Makes the queued calls; waits for one if no job runs. Returns False to stop."""
        while True:
            try:
                call = self._calls.get(block=not self._loop.has_work)
            except queue.Empty:
                return True
            if call is None:
                return False
            call()

    def _clear_cache(self) -> None:
        try:
            self._loop.clear_cache()
        except Exception:  # If the device is broken, a job fails in its next step.
            _log.exception("cache_not_cleared")

    def _warm_up(self, height: int, width: int, done: Future[None]) -> None:
        try:
            self._loop.warm_up(height, width, self._turn)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)
