"""The uploads of each tenant: one entry of a key-value bucket has all of them.

So the bytes of a tenant are counted and limited in one compare and swap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from img2img_server import clock
from img2img_server.errors import UploadsFullError
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KeyValue

MOST_UPLOADS: Final = 1000  # of a tenant; as many expired ones are known
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
        """Adds an upload that is not complete, and returns its record.

        If the tenant has a complete upload with this content, that one is returned unchanged. One
        that is not complete is replaced, and keeps its id and its create time.

        Raises:
            UploadsFullError: The tenant has no room for it.
        """
        found = upload

        def added(uploads: list[UploadRecord]) -> list[UploadRecord]:
            nonlocal found
            found = upload
            for each in uploads:
                if each.sha256 == upload.sha256 and not each.has_expired:
                    if each.is_complete:
                        found = each
                        return uploads
                    found = replace(upload, id=each.id, create_time=each.create_time)
            others = [each for each in uploads if each.id != found.id]
            _check_room(others, found, most_bytes)
            return [*others, found]

        await self._change(tenant, added)
        return found

    async def update(self, tenant: str, upload: UploadRecord, most_bytes: int) -> bool:
        """Replaces the record with the same id by that of a complete upload.

        Returns:
            Whether there is still a record with this id.

        Raises:
            UploadsFullError: The file is larger than its record says, and there is no room for it.
        """
        assert upload.is_complete, "a complete upload stays complete"
        is_known = False

        def updated(uploads: list[UploadRecord]) -> list[UploadRecord]:
            nonlocal is_known
            known = next((each for each in uploads if each.id == upload.id), None)
            is_known = known is not None
            if known is None:
                return uploads
            others = [each for each in uploads if each is not known]
            if upload.size_bytes > (0 if known.has_expired else known.size_bytes):
                _check_room(others, upload, most_bytes)
            return [*others, upload]

        await self._change(tenant, updated)
        return is_known

    async def remove(
        self, tenant: str, upload: UploadRecord, *, unless_changed: bool = False
    ) -> None:
        """Removes the record with the id of this one, if it exists.

        Args:
            unless_changed: Leave a record that differs from this one.
        """

        def left(uploads: list[UploadRecord]) -> list[UploadRecord]:
            if unless_changed:
                return [each for each in uploads if each != upload]
            return [each for each in uploads if each.id != upload.id]

        await self._change(tenant, left)

    async def _change(
        self, tenant: str, change: Callable[[list[UploadRecord]], list[UploadRecord]]
    ) -> None:
        key = subjects.token(tenant)
        while True:
            known = await self._bucket.get(key)
            uploads = list(codec.decode(known.value, _Entry).uploads) if known else []
            kept = _without_old(change(uploads))
            if kept == uploads:
                return
            entry = codec.encode(_Entry(tenant=tenant, uploads=tuple(kept)))
            with suppress(WrongLastSequenceError):  # Another call has changed the uploads.
                await self._bucket.swap(key, entry, known.revision if known else 0)
                return


def _check_room(others: list[UploadRecord], upload: UploadRecord, most_bytes: int) -> None:
    """Raises UploadsFullError if the upload and the other ones exceed the limits."""
    live = [each for each in others if not each.has_expired]
    used = sum(each.size_bytes for each in live)
    if used + upload.size_bytes > most_bytes or len(live) >= MOST_UPLOADS:
        ends = [each.expire_time for each in live]
        wait = max(1.0, min(ends) - clock.now()) if ends else None
        raise UploadsFullError(most_bytes, MOST_UPLOADS, retry_seconds=wait)


def _without_old(uploads: list[UploadRecord]) -> list[UploadRecord]:
    """Returns the uploads without those that expired long ago, or before many others.

    An entry has a greatest size, and announcements that expire every 15 minutes could exceed it.
    """
    gone = clock.now() - EXPIRED_SECONDS
    expired = [each for each in uploads if each.has_expired and each.expire_time > gone]
    newest = heapq.nlargest(MOST_UPLOADS, expired, key=lambda each: each.expire_time)
    known = {each.id for each in newest}
    return [each for each in uploads if not each.has_expired or each.id in known]


def kv_uploads(link: NatsConnection) -> UploadRecords:
    """Returns the records on JetStream."""
    return UploadRecords(Bucket(link, subjects.UPLOADS_BUCKET))
