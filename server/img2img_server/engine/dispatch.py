"""Hands the events of jobs out, each job's in order; no step waits for a picture to be read out.

step loop ── event ──▶ sink                         nothing of the job is on its way
    └── picture on its way ──▶ reader ──▶ sink      what the job tells next goes behind it
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from img2img_server.engine.base import EngineEvent
from img2img_server.engine.denoiser import Picture
from img2img_server.engine.rows import EngineJobState, emit
from img2img_server.imaging.base import Pixels

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """`make` may wait, and raise. `is_optional`: the job can do without it. `is_verdict`: goes out
    although the job is broken."""

    run: EngineJobState
    make: Callable[[], EngineEvent]
    is_optional: bool = False
    is_verdict: bool = False


class EventDispatcher:
    """Tells sinks: on the thread of the caller, or on its own where there is something to wait for.

    A job whose picture cannot be read out tells nothing more but its verdict.

    Args:
        failed: told of a run with a picture that cannot be read out, and why, on either thread.
            Whoever owns the run then says `verdict`.
    """

    def __init__(self, failed: Callable[[EngineJobState, Exception], None]) -> None:
        self._failed = failed
        self._line: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._on_the_way: Counter[EngineJobState] = Counter()
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._reader.start()

    def tell(self, run: EngineJobState, event: EngineEvent) -> None:
        """Hands an event out once what the job told before is out."""
        self._put(_Item(run, lambda: event))

    def finish(self, run: EngineJobState) -> None:
        """The same with JobDone, made only then."""
        self._put(_Item(run, run.done))

    def show(
        self,
        run: EngineJobState,
        picture: Picture,
        event: Callable[[Pixels], EngineEvent],
        *,
        is_optional: bool = False,
    ) -> None:
        """Hands a picture out when it is read out."""
        item = _Item(run, lambda: event(picture.pixels()), is_optional)
        self._put(item, must_wait=not picture.is_ready)

    def verdict(self, run: EngineJobState, event: EngineEvent) -> None:
        """Hands out the last event of a job whose picture failed."""
        self._put(_Item(run, lambda: event, is_verdict=True))

    def close(self) -> None:
        """Hands out what is on its way and ends the thread; from then on nothing may wait."""
        self._line.put(None)
        self._reader.join()

    def _put(self, item: _Item, must_wait: bool = False) -> None:
        with self._lock:
            must_wait = must_wait or self._on_the_way[item.run] > 0
            if must_wait:
                self._on_the_way[item.run] += 1
                self._line.put(item)
        if not must_wait:
            self._deliver(item)

    def _read(self) -> None:
        while item := self._line.get():
            self._deliver(item)
            with self._lock:
                self._on_the_way[item.run] -= 1
                if not self._on_the_way[item.run]:
                    del self._on_the_way[item.run]

    def _deliver(self, item: _Item) -> None:
        run = item.run
        if run.is_broken and not item.is_verdict:
            return
        try:
            event = item.make()
        except Exception as error:  # of the device, or a picture that cannot be shown
            if item.is_optional:
                _log.warning("a preview of job %d failed", run.job.job_id, exc_info=error)
                return
            run.is_broken = True
            self._failed(run, error)
        else:
            emit(run.sink, run.job, event)
