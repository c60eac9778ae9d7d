"""The usage of each tenant on each day, in a key-value bucket."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final

from img2img_server.domain.job import Job
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KeyValue
from img2img_server.nats.write_later import WriteLater
from img2img_server.telemetry import count_usage

FLUSH_SECONDS: Final = 5.0
MOST_DAYS: Final = 62  # days are kept this long


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Succeeded jobs, their images and the device seconds that they used."""

    jobs: int = 0
    images: int = 0
    device_seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            jobs=self.jobs + other.jobs,
            images=self.images + other.images,
            device_seconds=self.device_seconds + other.device_seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageOfDay:
    """The usage of one tenant on one day, in UTC."""

    day: date
    tenant: str
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """The value of a key. It has the tenant, since a key holds only its encoded form."""

    tenant: str
    usage: Usage


class UsageLedger:
    """Adds up what tenants use. The sums of a process are written every few seconds.

    A process that is killed loses the sums that it has not written.
    """

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket
        self._unwritten: dict[tuple[date, str], Usage] = {}
        self._later = WriteLater("usage", FLUSH_SECONDS, self._write, lambda: bool(self._unwritten))

    def note(self, job: Job) -> None:
        """Counts a job that has succeeded."""
        used = Usage(jobs=1, images=len(job.samples), device_seconds=job.device_seconds)
        count_usage(job.tenant, job.device_seconds)
        key = datetime.fromtimestamp(job.end_time, UTC).date(), job.tenant
        self._unwritten[key] = self._unwritten.get(key, Usage()) + used
        self._later.changed()

    async def close(self) -> None:
        """Writes the last sums, if NATS can be used."""
        await self._later.close()

    async def _write(self) -> None:
        for (day, tenant), used in list(self._unwritten.items()):
            del self._unwritten[day, tenant]
            try:
                await self._add(day, tenant, used)
            except BaseException:  # It is written later.
                later = self._unwritten.get((day, tenant), Usage())
                self._unwritten[day, tenant] = later + used
                raise

    async def _add(self, day: date, tenant: str, used: Usage) -> None:
        key = f"{day}.{subjects.token(tenant)}"
        while True:
            known = await self._bucket.get(key)
            entry = (
                codec.decode(known.value, _Entry) if known else _Entry(tenant=tenant, usage=Usage())
            )
            total = _Entry(tenant=tenant, usage=entry.usage + used)
            with suppress(WrongLastSequenceError):  # Another worker has written.
                await self._bucket.swap(key, codec.encode(total), known.revision if known else 0)
                return

    async def read(self, today: date, days: int, tenant: str = "") -> Sequence[UsageOfDay]:
        """Returns the usage of the last `days` days, newest first, then by tenant.

        Args:
            tenant: Only this tenant; empty: all.

        Raises:
            UnavailableError.
        """
        pattern = subjects.token(tenant) if tenant else "*"
        found = []
        for back in range(days):
            day = today - timedelta(days=back)
            for key in sorted(await self._bucket.keys(f"{day}.{pattern}")):
                if known := await self._bucket.get(key):
                    entry = codec.decode(known.value, _Entry)
                    found.append(UsageOfDay(day=day, tenant=entry.tenant, usage=entry.usage))
        return found


def kv_usage(link: NatsConnection) -> UsageLedger:
    """Returns the ledger on JetStream."""
    return UsageLedger(Bucket(link, subjects.USAGE_BUCKET))
