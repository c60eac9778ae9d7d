"""The engine: one thread owns the device; others hand it commands, which it takes between steps.

A second one waits for pictures on their way from the device, see outbox.py.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from img2img_server.domain.job import Determinism
from img2img_server.domain.models import ModelInfo
from img2img_server.engine.base import EngineJob, Sink
from img2img_server.engine.denoiser import Denoiser
from img2img_server.engine.dispatch import EventDispatcher
from img2img_server.engine.memory import MemoryModel, meter_of
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.engine.rows import EngineJobState
from img2img_server.engine.step_loop import StepLoop
from img2img_server.errors import EngineError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Submit:
    job: EngineJob
    sink: Sink


@dataclass(frozen=True, slots=True)
class _Cancel:
    job_id: int


class _ClearCache:
    pass


class _Stop:
    pass


@dataclass(frozen=True, slots=True, eq=False)
class _WarmUp:
    height: int
    width: int
    done: Future[None]


@dataclass(frozen=True, slots=True, eq=False)
class _Unread:
    run: EngineJobState
    error: Exception


_Command = _Submit | _Cancel | _ClearCache | _WarmUp | _Unread | _Stop


class DiffusionEngine:
    """Engine of base.py on a Denoiser. Its thread starts at once.

    Args:
        spec: the model's name, defaults and limits.
        max_batch_size: the largest batch, in forwards; a guided sample costs two.
        memory: what is known of the device's memory; None: that of the denoiser's device.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        spec: ModelSpec,
        max_batch_size: int,
        memory: MemoryModel | None = None,
    ) -> None:
        self._denoiser = denoiser
        self._spec = spec
        self._max_batch_size = max_batch_size
        memory = memory or MemoryModel(meter_of(denoiser.device))
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._outbox = EventDispatcher(lambda run, error: self._commands.put(_Unread(run, error)))
        self._loop = StepLoop(denoiser, spec, max_batch_size, memory, self._outbox)
        self._lock = threading.Lock()
        self._stopping = False
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

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
    def max_batch_size(self) -> int:
        return self._max_batch_size

    @property
    def busy_seconds(self) -> float:
        return self._busy_seconds

    def submit(self, job: EngineJob, sink: Sink) -> None:
        with self._lock:
            if self._stopping:
                raise EngineError("the engine is stopped")
            self._commands.put(_Submit(job, sink))

    def cancel(self, job_id: int) -> None:
        self._commands.put(_Cancel(job_id))

    def clear_cache(self) -> None:
        self._commands.put(_ClearCache())

    def warm_up(self, height: int, width: int) -> None:
        """Runs everything once at this size. Blocks; for seconds to minutes where it compiles.

        On the engine's own thread: CUDA graphs belong to the thread that captured them.

        Raises:
            Exception: whatever the model raised.
        """
        done: Future[None] = Future()
        self._commands.put(_WarmUp(height, width, done))
        done.result()

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            self._commands.put(_Stop())
        self._thread.join()

    def _run(self) -> None:
        device = self._denoiser.device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # events and streams are those of the thread's device
        with torch.inference_mode():
            while self._take_commands():
                began = time.monotonic()
                self._loop.run_batch()
                self._busy_seconds += time.monotonic() - began
        self._loop.stop_all()
        self._outbox.close()
        while not self._commands.empty():  # of pictures that failed last
            if isinstance(command := self._commands.get(), _Unread):
                self._loop.unread(command.run, command.error)

    def _take_commands(self) -> bool:
        """Takes what has come in; waits when there is nothing to run. Returns whether to go on."""
        while True:
            try:
                command = self._commands.get(block=not self._loop.has_work)
            except queue.Empty:
                return True
            match command:
                case _Submit():
                    self._loop.begin(command.job, command.sink)
                case _Cancel():
                    self._loop.cancel(command.job_id)
                case _ClearCache():
                    self._clear_cache()
                case _WarmUp():
                    self._warm_up(command)
                case _Unread():
                    self._loop.unread(command.run, command.error)
                case _Stop():
                    return False

    def _clear_cache(self) -> None:
        try:
            self._loop.clear_cache()
        except Exception:  # jobs can do without; those of a broken device learn it from their steps
            _log.exception("the cache cannot be cleared")

    def _warm_up(self, command: _WarmUp) -> None:
        try:
            self._loop.warm_up(command.height, command.width)
        except Exception as error:
            command.done.set_exception(error)
        else:
            command.done.set_result(None)
