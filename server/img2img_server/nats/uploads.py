"""The uploads of each tenant: one entry of a key-value bucket has all of them.

So the bytes of a tenant are counted and limited in one compare and swap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from img2img_server import clock
from img2img_server.errors import UploadsFullError
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KeyValue

MOST_UPLOADS: Final = 1000  # of a tenant
EXPIRED_SECONDS: Final = 24 * 3600.0  # so long an expired upload is known as expired


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadRecord:
    """An upload of a tenant. `media_type` is empty until the file is stored and was checked."""

    id: str
    sha256: str
    size_bytes: int
    create_time: float
    expire_time: float
    media_type: str = ""

    @property
    def is_complete(self) -> bool:
        return bool(self.media_type)

    @property
    def has_expired(self) -> bool:
        return self.expire_time <= clock.now()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """The value of a key. It has the tenant, since a key holds only its encoded form."""

    tenant: str
    uploads: tuple[UploadRecord, ...] = ()


class UploadRecords:
    """The records of uploads. Methods raise UnavailableError."""

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket

    async def all(self, tenant: str) -> Sequence[UploadRecord]:
        """Returns the tenant's uploads, expired ones of the last day too."""
        known = await self._bucket.get(subjects.token(tenant))
        return codec.decode(known.value, _Entry).uploads if known else ()

    async def add(self, tenant: str, upload: UploadRecord, most_bytes: int) -> UploadRecord:
        """Adds an upload, or returns the one with the same content that has not expired.

        Raises:
            UploadsFullError: The tenant has no room for it.
        """
        found = upload

        def added(uploads: list[UploadRecord]) -> list[UploadRecord]:
            nonlocal found
            kept = [each for each in uploads if not each.has_expired]
            for each in kept:
                if each.sha256 == upload.sha256:
                    found = each
                    return uploads
            found = upload
            used = sum(each.size_bytes for each in kept)
            if used + upload.size_bytes > most_bytes or len(kept) >= MOST_UPLOADS:
                ends = [each.expire_time for each in kept]
                wait = max(1.0, min(ends) - clock.now()) if ends else None
                raise UploadsFullError(most_bytes, MOST_UPLOADS, retry_seconds=wait)
            return [*uploads, upload]

        await self._change(tenant, added)
        return found

    async def replace(self, tenant: str, upload: UploadRecord) -> None:
        """Replaces the record of the upload with the same id, or adds it."""

        def replaced(uploads: list[UploadRecord]) -> list[UploadRecord]:
            return [*(each for each in uploads if each.id != upload.id), upload]

        await self._change(tenant, replaced)

    async def remove(self, tenant: str, upload_id: str) -> None:
        """Removes the upload, if it exists."""
        await self._change(tenant, lambda all_: [each for each in all_ if each.id != upload_id])

    async def _change(
        self, tenant: str, change: Callable[[list[UploadRecord]], list[UploadRecord]]
    ) -> None:
        key, gone = subjects.token(tenant), clock.now() - EXPIRED_SECONDS
        while True:
            known = await self._bucket.get(key)
            uploads = list(codec.decode(known.value, _Entry).uploads) if known else []
            kept = [each for each in change(uploads) if each.expire_time > gone]
            if kept == uploads:
                return
            entry = codec.encode(_Entry(tenant=tenant, uploads=tuple(kept)))
            with suppress(WrongLastSequenceError):  # Another call has changed the uploads.
                await self._bucket.swap(key, entry, known.revision if known else 0)
                return


def kv_uploads(link: NatsConnection) -> UploadRecords:
    """Returns the records on JetStream."""
    return UploadRecords(Bucket(link, subjects.UPLOADS_BUCKET))
