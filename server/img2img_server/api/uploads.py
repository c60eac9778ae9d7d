"""Uploads: init images that are stored once and named by many jobs.

The file of a complete upload is uploads/{tenant}/{sha256} in the service's own bucket, so the same
content of a tenant is one file. A file that a caller sends straight to the bucket has the key
uploads/{tenant}/incoming-{id}; it is copied after its check, because its URL can be used again.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final
from weakref import WeakValueDictionary

from img2img_server import clock, errors
from img2img_server.budget import Budget
from img2img_server.domain.params import Limits
from img2img_server.domain.violations import (
    SHOWN_CHARACTERS,
    Reason,
    Violation,
    out_of_range,
    required,
)
from img2img_server.imaging.base import InvalidImageError
from img2img_server.imaging.decoder import ImageDecoder
from img2img_server.imaging.header import container_of
from img2img_server.nats.uploads import UploadRecord, UploadRecords
from img2img_server.settings import Settings
from img2img_server.storage.interface import BlobStore

PUT_SECONDS: Final = 900  # how long the URL of an upload can be used
FOLDER: Final = "uploads"
HASH_PREFIX: Final = "sha256:"
NAME_PREFIX: Final = "uploads/"
_SHA256: Final = re.compile("[0-9a-fA-F]{64}")
_SIDE_PIXELS: Final = 256  # The prepared image is not used: the check decodes the whole file.


class Uploads:
    """Stores, checks and finds uploads.

    Args:
        blobs: The service's own bucket; None: this server takes no uploads.
        downloaded: The budget of the bytes that are read from the bucket.
    """

    def __init__(
        self,
        settings: Settings,
        records: UploadRecords,
        blobs: BlobStore | None,
        decoder: ImageDecoder,
        limits: Limits,
        downloaded: Budget,
    ) -> None:
        self._most_bytes = settings.upload_bytes
        self._seconds = settings.upload_hours * 3600.0
        self._records = records
        self._blobs = blobs if settings.upload_bytes else None
        self._decoder = decoder
        self._limits = limits
        self._downloaded = downloaded
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def create(
        self, tenant: str, image: bytes, sha256: str = "", size_bytes: int = 0
    ) -> UploadRecord:
        """Stores an image, and returns its complete upload.

        Args:
            sha256: The hash that the image must have, if it is not empty.
            size_bytes: The size that the image must have, if it is not 0.

        Raises:
            InvalidRequestError, UploadsFullError, UploadsDisabledError, UnavailableError.
        """
        self._store()
        if size_bytes not in (0, len(image)):
            raise _other_file("size_bytes", len(image), size_bytes)
        found = await asyncio.to_thread(_sha256, image)
        if sha256.lower() not in ("", found):
            raise _other_file("sha256", found, sha256[:SHOWN_CHARACTERS])
        media_type = await self._media_type(tenant, image)
        while True:
            # Until the file is stored: a record without a file counts no longer than that.
            new = self._new(found, len(image), PUT_SECONDS)
            upload = await self._records.add(tenant, new, self._most_bytes)
            try:
                return await self._stored(tenant, upload, image, media_type)
            except errors.UploadNotFoundError:
                continue  # It was deleted meanwhile.
            except BaseException:
                if upload is new:  # A call that sends the same image may have completed it.
                    with suppress(errors.UnavailableError):
                        await self._records.remove(tenant, new, unless_changed=True)
                raise

    async def announce(
        self, tenant: str, sha256: str, size_bytes: int
    ) -> tuple[UploadRecord, str, float]:
        """Returns an upload whose file is sent to a URL, the URL and the Unix time of its end.

        The URL is empty if the tenant has a complete upload with this content.

        Raises:
            InvalidRequestError, UploadsFullError, UploadsDisabledError, UnavailableError.
        """
        blobs = self._store()
        if violations := self._wrong(sha256, size_bytes):
            raise errors.InvalidRequestError(violations)
        new = self._new(sha256.lower(), size_bytes, PUT_SECONDS)
        upload = await self._records.add(tenant, new, self._most_bytes)
        if upload.is_complete:
            return upload, "", 0.0
        try:
            url = await blobs.put_url(_incoming_key(tenant, upload), PUT_SECONDS)
        except errors.StorageError as error:
            raise errors.UnavailableError(str(error), error.detail) from error
        return upload, url, upload.expire_time

    async def complete(self, tenant: str, name: str) -> UploadRecord:
        """Checks the file that was sent to the URL of the upload.

        Raises:
            InvalidRequestError, UploadNotFoundError, UploadExpiredError, UploadIncompleteError,
            UploadsFullError, UploadsDisabledError, ServerBusyError, UnavailableError.
        """
        upload = await self.get(tenant, name)
        if not upload.is_complete:
            with self._downloaded.try_take(tenant, 0) as held:
                upload, _ = await self._completed(tenant, upload, held.resize)
        return upload

    async def get(self, tenant: str, name: str) -> UploadRecord:
        """Returns an upload.

        Args:
            name: "uploads/{id}", the id, or "sha256:" and the hash.

        Raises:
            UploadNotFoundError, UploadExpiredError, UploadsDisabledError, UnavailableError.
        """
        self._store()
        found = [each for each in await self._records.all(tenant) if _is_named(each, name)]
        if not found:
            raise errors.UploadNotFoundError(name[:SHOWN_CHARACTERS])
        # A hash can be that of an expired upload and of a new one.
        upload = max(found, key=lambda each: each.expire_time)
        if upload.has_expired:
            raise errors.UploadExpiredError(name[:SHOWN_CHARACTERS])
        return upload

    async def delete(self, tenant: str, name: str) -> None:
        """Deletes an upload and its file.

        Raises:
            UploadNotFoundError, UploadsDisabledError, UnavailableError.
        """
        try:
            upload = await self.get(tenant, name)
        except errors.UploadExpiredError as error:
            raise errors.UploadNotFoundError(error.upload) from error
        await self._records.remove(tenant, upload)
        await self._delete_unnamed(tenant, upload)
        await self._delete(_incoming_key(tenant, upload))

    async def content(self, tenant: str, name: str, report: Callable[[int], None]) -> bytes:
        """Returns the file of an upload, after its check if it was not complete.

        Args:
            report: Called with the size of the file before it is read.

        Raises:
            The errors of `complete`, and of `report`.
        """
        upload = await self.get(tenant, name)
        if not upload.is_complete:
            upload, data = await self._completed(tenant, upload, report)
            if data is not None:
                return data
        report(upload.size_bytes)
        try:
            data = await self._read(_key(tenant, upload), upload.size_bytes)
        except KeyError:
            # The bucket has lost it: the next announcement of the content gets a URL again.
            await self._records.remove(tenant, upload, unless_changed=True)
            data = None
        if data is None:
            raise errors.UploadNotFoundError(name[:SHOWN_CHARACTERS])
        return data

    def _store(self) -> BlobStore:
        if self._blobs is None:
            raise errors.UploadsDisabledError
        return self._blobs

    def _new(self, sha256: str, size_bytes: int, seconds: float) -> UploadRecord:
        now = clock.now()
        return UploadRecord(
            id=uuid.uuid4().hex,
            sha256=sha256,
            size_bytes=size_bytes,
            create_time=now,
            expire_time=now + seconds,
        )

    def _wrong(self, sha256: str, size_bytes: int) -> list[Violation]:
        violations = []
        if not sha256:
            violations.append(required("sha256"))
        elif not _SHA256.fullmatch(sha256):
            message = "sha256 must be 64 hexadecimal digits"
            violations.append(Violation("sha256", Reason.INVALID_FORMAT, message))
        if not 1 <= size_bytes <= self._limits.max_image_bytes:
            violations.append(out_of_range("size_bytes", 1, self._limits.max_image_bytes))
        return violations

    async def _media_type(self, tenant: str, image: bytes) -> str:
        """Returns the media type of an image that jobs can use. Raises InvalidRequestError."""
        try:
            await self._decoder.check(
                tenant, image, width=_SIDE_PIXELS, height=_SIDE_PIXELS, limits=self._limits
            )
        except InvalidImageError as error:
            wrong = error.violation
            message = wrong.message.replace("init_image", "image", 1)
            raise errors.InvalidRequestError(
                [replace(wrong, field="image", message=message)]
            ) from error
        container = container_of(image)
        assert container is not None, "it was decoded"
        return container.media_type

    async def _stored(
        self, tenant: str, upload: UploadRecord, image: bytes, media_type: str
    ) -> UploadRecord:
        """Stores the file and returns the record, whose time begins again.

        Raises:
            UploadNotFoundError: The upload was deleted meanwhile.
            UploadsFullError: The upload was announced with fewer bytes meanwhile.
            UnavailableError.
        """
        # The file is stored again if there is one: the bucket deletes files by their age.
        try:
            await self._store().put(_key(tenant, upload), image, media_type)
        except errors.StorageError as error:
            raise errors.UnavailableError(str(error), error.detail) from error
        end = clock.now() + self._seconds
        size = len(image)
        complete = replace(upload, size_bytes=size, media_type=media_type, expire_time=end)
        try:
            is_known = await self._records.update(tenant, complete, self._most_bytes)
        except errors.UploadsFullError:
            await self._delete_unnamed(tenant, upload)
            raise
        if not is_known:
            await self._delete_unnamed(tenant, upload)
            raise errors.UploadNotFoundError(upload.id)
        return complete

    async def _completed(
        self, tenant: str, upload: UploadRecord, report: Callable[[int], None]
    ) -> tuple[UploadRecord, bytes | None]:
        """Returns the complete upload, and its file if it was read for its check.

        One call at a time reads the file of an upload; the next ones find it complete.
        """
        lock = self._locks.setdefault((tenant, upload.id), asyncio.Lock())
        async with lock:
            upload = await self.get(tenant, upload.id)
            if upload.is_complete:
                return upload, None
            try:
                return await self._checked(tenant, upload, report)
            except errors.UploadIncompleteError:
                # Another api may have completed it, and has deleted the file that was sent.
                upload = await self.get(tenant, upload.id)
                if upload.is_complete:
                    return upload, None
                raise

    async def _checked(
        self, tenant: str, upload: UploadRecord, report: Callable[[int], None]
    ) -> tuple[UploadRecord, bytes]:
        """Checks the file that was sent, and stores it. Raises the errors of `complete`."""
        incoming = _incoming_key(tenant, upload)
        try:
            info = await self._store().stat(incoming)
        except errors.StorageError as error:
            raise errors.UnavailableError(str(error), error.detail) from error
        if info is None:
            raise errors.UploadIncompleteError(upload.id)
        try:
            if info.size_bytes != upload.size_bytes:
                raise _other_file("size_bytes", info.size_bytes, upload.size_bytes)
            report(upload.size_bytes)
            data = None
            with suppress(KeyError):
                data = await self._read(incoming, upload.size_bytes)
            if data is None:
                raise errors.UploadIncompleteError(upload.id)
            sha256 = await asyncio.to_thread(_sha256, data)
            if sha256 != upload.sha256:
                raise _other_file("sha256", sha256, upload.sha256)
            media_type = await self._media_type(tenant, data)
        except errors.InvalidRequestError:
            await self._delete(incoming)
            raise
        complete = await self._stored(tenant, upload, data, media_type)
        await self._delete(incoming)
        return complete, data

    async def _read(self, key: str, size_bytes: int) -> bytes | None:
        """Returns a file of this size; None if it has another size.

        Raises:
            KeyError: There is no such file.
            UnavailableError.
        """
        data = bytearray()
        try:
            async for chunk in self._store().read(key):
                data += chunk
                if len(data) > size_bytes:
                    return None
        except errors.StorageError as error:
            raise errors.UnavailableError(str(error), error.detail) from error
        return bytes(data) if len(data) == size_bytes else None

    async def _delete_unnamed(self, tenant: str, upload: UploadRecord) -> None:
        """Deletes the file of an upload that is not stored, unless another one has the content."""
        for each in await self._records.all(tenant):
            is_other = each.is_complete or each.id != upload.id
            if is_other and each.sha256 == upload.sha256 and not each.has_expired:
                return
        await self._delete(_key(tenant, upload))

    async def _delete(self, key: str) -> None:
        with suppress(errors.StorageError):  # The bucket deletes it by its age.
            await self._store().delete(key)


def _other_file(name: str, found: object, expected: object) -> errors.InvalidRequestError:
    message = f"{name} of the file that was sent is {found}, not {expected}"
    return errors.InvalidRequestError([Violation(name, Reason.INVALID_FORMAT, message)])


def _is_named(upload: UploadRecord, name: str) -> bool:
    if name.startswith(HASH_PREFIX):
        return upload.sha256 == name.removeprefix(HASH_PREFIX).lower()
    return upload.id == name.removeprefix(NAME_PREFIX)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _key(tenant: str, upload: UploadRecord) -> str:
    return f"{FOLDER}/{tenant}/{upload.sha256}"


def _incoming_key(tenant: str, upload: UploadRecord) -> str:
    return f"{FOLDER}/{tenant}/incoming-{upload.id}"
