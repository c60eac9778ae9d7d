"""Ends jobs that no worker has completed within the retention."""

from __future__ import annotations

import asyncio
import random
from typing import Final

import structlog

from img2img_server import clock, errors
from img2img_server.api.cancel import Canceller
from img2img_server.interfaces.queue import JobQueue

INTERVAL_SECONDS: Final = 60.0  # on average, between two searches of the queue

log = structlog.get_logger()


class QueueExpiry:
    """Ends the jobs that wait for longer than the retention, with a reason and their webhook.

    Without it, the queue would delete them half an hour later, and their records would follow.
    """

    def __init__(self, queue: JobQueue, canceller: Canceller, retention_hours: int) -> None:
        self._queue = queue
        self._canceller = canceller
        self._retention_hours = retention_hours

    async def run(self) -> None:
        """Ends expired jobs again and again until it is cancelled."""
        while True:
            # Each api waits for another time, so that one of them does the work.
            await asyncio.sleep(INTERVAL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                await self.end_expired()
            except errors.UnavailableError as error:
                log.warning("expired_jobs_not_ended", error=str(error))

    async def end_expired(self) -> int:
        """Ends the expired jobs that no worker runs now. Returns their number.

        Raises:
            UnavailableError: Some may have ended.
        """
        before, place, ended = clock.now() - self._retention_hours * 3600, 0, 0
        while found := await self._queue.next_before(before, place):
            place, job = found
            ended += await self._canceller.expire(job.tenant, job.job_id, self._retention_hours)
        return ended
