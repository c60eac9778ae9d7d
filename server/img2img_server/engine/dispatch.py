"""Emits the events of each job in order; no step waits until an image is on the host.

step loop ── event ──▶ sink                     if no image of the job is being copied
    └── image ──▶ reader thread ──▶ sink        later events of the job go behind it
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from img2img_server.engine.base import EngineEvent
from img2img_server.engine.denoiser import DeviceImage
from img2img_server.engine.rows import EngineJobState, emit
from img2img_server.imaging.base import Pixels

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """One event to emit.

    Attributes:
        make: Returns the event; may wait for the device and raise an error.
        is_optional: The job continues if it fails.
        is_final: It is emitted although the job is broken.
    """

    run: EngineJobState
    make: Callable[[], EngineEvent]
    is_optional: bool = False
    is_final: bool = False


class EventDispatcher:
    """Calls the sinks: on the caller's thread, or on its own thread if an image must be waited for.

    A job whose image cannot be copied emits only its last event.

    Args:
        failed: called with a run whose image cannot be copied, and the error, on either thread. The
            owner of the run then calls `emit_final_event`.
    """

    def __init__(self, failed: Callable[[EngineJobState, Exception], None]) -> None:
        self._failed = failed
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._copies: Counter[EngineJobState] = Counter()
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()

    def emit(self, run: EngineJobState, event: EngineEvent) -> None:
        """Emits an event after all earlier events of the job."""
        self._put(_Item(run, lambda: event))

    def finish(self, run: EngineJobState) -> None:
        """Emits JobDone, built after all earlier events of the job."""
        self._put(_Item(run, run.done))

    def emit_image(
        self,
        run: EngineJobState,
        image: DeviceImage,
        event: Callable[[Pixels], EngineEvent],
        *,
        is_optional: bool = False,
    ) -> None:
        """Emits the event of an image once the image is on the host."""
        item = _Item(run, lambda: event(image.pixels()), is_optional)
        self._put(item, must_wait=not image.is_ready)

    def emit_final_event(self, run: EngineJobState, event: EngineEvent) -> None:
        """Emits the last event of a job whose image could not be copied."""
        self._put(_Item(run, lambda: event, is_final=True))

    def close(self) -> None:
        """Emits the waiting events and ends the thread; later events must not wait."""
        self._waiting.put(None)
        self._reader.join()

    def _put(self, item: _Item, must_wait: bool = False) -> None:
        with self._lock:
            must_wait = must_wait or self._copies[item.run] > 0
            if must_wait:
                self._copies[item.run] += 1
                self._waiting.put(item)
        if not must_wait:
            self._deliver(item)

    def _read(self) -> None:
        while item := self._waiting.get():
            self._deliver(item)
            with self._lock:
                self._copies[item.run] -= 1
                if not self._copies[item.run]:
                    del self._copies[item.run]

    def _deliver(self, item: _Item) -> None:
        run = item.run
        if run.is_broken and not item.is_final:
            return
        try:
            event = item.make()
        except Exception as error:  # an error of the device, or values that are not finite
            if item.is_optional:
                _log.warning("preview_failed: job %d", run.job.job_id, exc_info=error)
                return
            run.is_broken = True
            self._failed(run, error)
        else:
            emit(run.sink, run.job, event)
