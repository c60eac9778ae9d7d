"""Permits on the PERMITS stream, whose limit per subject is the tenants' limit."""

from __future__ import annotations

import uuid

from img2img_server.errors import QueueFullError
from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import SubjectFullError


class JetStreamPermits:
    """Permits on JetStream. `limit`: the stream's limit, named in errors."""

    def __init__(self, link: NatsConnection, *, limit: int = 0) -> None:
        self._link = link
        self._limit = limit

    async def take(self, tenant: str, job_id: int) -> int:
        # With the id, the server ignores a repeated publish after a lost response.
        headers = {"Nats-Msg-Id": str(uuid.uuid4())}
        subject = subjects.permits_subject(tenant)
        try:
            return (await self._link.publish(subject, str(job_id).encode(), headers)).seq
        except SubjectFullError as error:
            raise QueueFullError(self._limit) from error

    async def release(self, permit: int) -> None:
        if permit:
            await self._link.delete(subjects.PERMITS, permit)

    async def count(self, tenant: str) -> int:
        return await self._link.count(subjects.PERMITS, subjects.permits_subject(tenant))

    async def oldest(self, tenant: str, most: int) -> list[tuple[int, int]]:
        subject = subjects.permits_subject(tenant)
        found = await self._link.first(subjects.PERMITS, subject, 1, most)
        return [(permit, int(job_id)) for permit, job_id in found]
