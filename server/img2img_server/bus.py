"""The parts of the bus that a role is handed, on one connection or in one process."""

from __future__ import annotations

from dataclasses import dataclass

from img2img_server.queue.base import Control, EventLog, JobQueue
from img2img_server.queue.memory import MemoryControl, MemoryEventLog, MemoryJobQueue
from img2img_server.store.base import JobStore, WorkerRegistry
from img2img_server.store.memory import MemoryJobStore, MemoryWorkerRegistry


@dataclass(frozen=True, slots=True, kw_only=True)
class Bus:
    """Everything that roles share."""

    queue: JobQueue
    events: EventLog
    control: Control
    jobs: JobStore
    workers: WorkerRegistry


def memory_bus(*, queue_limit: int = 15, ack_wait_seconds: float = 15.0) -> Bus:
    """A bus of one process, for tests."""
    return Bus(
        queue=MemoryJobQueue(limit=queue_limit, ack_wait_seconds=ack_wait_seconds),
        events=MemoryEventLog(),
        control=MemoryControl(),
        jobs=MemoryJobStore(),
        workers=MemoryWorkerRegistry(),
    )
