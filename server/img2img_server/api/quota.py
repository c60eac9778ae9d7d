"""The tenants' limits of unfinished jobs, over all models and lanes."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

import structlog

from img2img_server.errors import QueueFullError
from img2img_server.interfaces.records import ConflictError, UnreadableError
from img2img_server.nats.bus import Bus

# Seconds that an api has to get a job from its permit to the queue before other apis abandon it,
# which they do only if the tenant has reached its limit.
ABANDON_SECONDS: Final = 30.0
_AGAIN_SECONDS: Final = 5.0  # between two searches for a tenant's leftover permits
_EXAMINED: Final = 100  # most permits that one search examines, oldest first
_REMEMBERED: Final = 10_000

log = structlog.get_logger()


class Quota:
    """Takes permits, and releases permits whose process died before it released them.

    Leftover permits matter only when a tenant reaches its limit, so they are searched for only
    then. No clocks of different machines are compared: this api has to see a permit without an
    accepted job twice, `abandon_seconds` apart.
    """

    def __init__(self, bus: Bus, *, limit: int, abandon_seconds: float = ABANDON_SECONDS) -> None:
        self._permits = bus.permits
        self._jobs = bus.jobs
        self._limit = limit
        self._abandon_seconds = abandon_seconds
        self._seen: dict[int, float] = {}  # monotonic time by permit without an accepted job
        self._searched: dict[str, float] = {}  # monotonic time of the last search by tenant

    async def unfinished(self, tenant: str) -> int:
        """Returns the number of the tenant's unfinished jobs. Raises UnavailableError."""
        count = await self._permits.count(tenant)
        if count >= self._limit and await self._release_leftovers(tenant):
            return await self._permits.count(tenant)
        return count

    async def take(self, tenant: str, job_id: int) -> int:
        """Takes a permit for a new job. Raises QueueFullError, UnavailableError."""
        try:
            return await self._permits.take(tenant, job_id)
        except QueueFullError:
            if not await self._release_leftovers(tenant):
                raise
            return await self._permits.take(tenant, job_id)

    async def release(self, permit: int) -> None:
        """Releases the permit of a job that was not accepted. Raises UnavailableError."""
        await self._permits.release(permit)

    async def _release_leftovers(self, tenant: str) -> int:
        """Releases the permits of jobs that have ended or never were accepted; returns their
        number.
        """
        now = time.monotonic()
        if now - self._searched.get(tenant, -_AGAIN_SECONDS) < _AGAIN_SECONDS:
            return 0
        if len(self._searched) >= _REMEMBERED:
            self._searched.clear()
        self._searched[tenant] = now
        found = await self._permits.oldest(tenant, _EXAMINED)
        released = 0
        for permit, job_id in found:
            if await self._is_leftover(tenant, permit, job_id):
                await self._permits.release(permit)
                self._seen.pop(permit, None)
                released += 1
        if released:
            log.info("leftover_permits_released", tenant=tenant, permits=released)
        return released

    async def _is_leftover(self, tenant: str, permit: int, job_id: int) -> bool:
        """Returns whether no job counts on the permit any more. Abandons a record that waits too
        long for its job to be queued.
        """
        try:
            job, revision = await self._jobs.latest(tenant, job_id)
        except UnreadableError:
            return False
        if job is not None and (job.permit != permit or job.state.is_terminal):
            # A call that holds another permit than the record has lost the job to another call.
            return True
        if job is not None and job.is_accepted:
            return False
        if len(self._seen) >= _REMEMBERED:
            self._seen.clear()
        first_seen = self._seen.setdefault(permit, time.monotonic())
        if time.monotonic() - first_seen < self._abandon_seconds:
            return False
        with suppress(ConflictError):
            # From here on the call that took the permit cannot have its job accepted.
            await self._jobs.abandon(tenant, job_id, revision)
            return True
        return False
