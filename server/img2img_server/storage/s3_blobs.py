"""Files in an S3 bucket, through the minio SDK on threads of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, Final, TypeVar

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import MinioException, S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

from img2img_server.clock import SkewReport
from img2img_server.errors import StorageError
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.interface import CACHE_CONTROL, BlobInfo, StoredFile
from img2img_server.storage.s3_access import S3Access
from img2img_server.storage.s3_faults import (
    DENIED,
    FAULTS,
    MISSING,
    NoBucketError,
    NotAStoreError,
    clock_skew,
    explain,
    is_repeatable_refusal,
    is_transient,
)
from img2img_server.telemetry import STORE_CALLS

CHUNK_BYTES: Final = 64 * 1024
COPY_BYTES: Final = 2**20
PART_BYTES: Final = 64 * 2**20  # bytes; files are far smaller, so each upload takes one request
THREADS: Final = 8
# The SDK repeats a request at once and after a second if the connection fails or the store reports
# a transient error. Failures of TLS are not repeated.
RETRIES: Final = urllib3.Retry(
    total=2,
    other=0,
    backoff_factor=0.5,
    backoff_jitter=0.2,
    allowed_methods=None,
    status_forcelist=(429, 500, 502, 503, 504),
    raise_on_status=False,
)
# seconds before a call is repeated that the store refused for a reason that passes. The SDK repeats
# only by the HTTP status, and some of these refusals are 400 or 409.
REPEAT_SECONDS: Final = (0.2, 0.8)
CONNECT_SECONDS: Final = 3.0
READ_SECONDS: Final = 30.0
ATTEMPT_SECONDS: Final = 5.0  # seconds; least time for an attempt at the start
CLOSE_SECONDS: Final = 2.0  # seconds; longest wait for calls whose callers were cancelled
UPLOADS: Final = "uploads"
FOLDERS: Final = ("generations", "temp", UPLOADS)

# The file of the start check. The bucket expires it if the key must not delete.
CHECK_KEY: Final = "temp/img2img-check-{}.txt"
CHECK_DATA: Final = b"A check of img2img whether files can be stored; it may be deleted.\n"
RULES_SECONDS: Final = 20.0  # seconds; longest wait for the lifecycle rules
# seconds between attempts at the start; the last value repeats
RETRY_SECONDS: Final = (0.5, 1.0, 2.0, 5.0)
_MINE_ALREADY: Final = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})
_NO_RULES: Final = "NoSuchLifecycleConfiguration"

T = TypeVar("T")
log = logging.getLogger(__name__)


class S3BlobStore:
    """A BlobStore in one bucket; created by `connect_blobs`."""

    def __init__(
        self,
        client: Minio,
        pool: ThreadPoolExecutor,
        access: S3Access,
        *,
        keep_days: int,
        upload_days: int = 1,
        public_client: Minio | None = None,
    ) -> None:
        self._client = client
        # Signs URLs for callers, who may reach the store at another address.
        self._public_client = public_client or client
        self._upload_days = upload_days
        self._pool = pool
        self._access = access
        self._bucket = access.bucket
        self._keep_days = keep_days
        self._warned: set[str] = set()
        self._skew = SkewReport(
            "the object store", "It refuses requests if the difference exceeds 15 minutes."
        )
        self._putting: dict[
            Future[Any], str
        ] = {}  # The SDK's threads continue after their callers are cancelled.

    async def prepare(self, seconds: float = 0.0) -> None:
        """Proves that files can be stored, and creates the bucket if it is missing. Then sets the
        lifecycle rules that delete old files, and warns if the store refuses them.

        Args:
            seconds: How long attempts are repeated while the store cannot be reached.

        Raises:
            SettingsError: The store refuses permanently; the sentence names the setting.
            StorageError: The store cannot be reached; the sentence names the setting.
        """
        await self._until(self._prove_writable, seconds)
        try:
            async with asyncio.timeout(RULES_SECONDS):
                await self._call(self._make_rules)
        except (StorageError, TimeoutError) as error:
            why = f"no response within {RULES_SECONDS:g} s"
            if isinstance(error, StorageError):
                why = explain(error.__cause__, self._access).sentence
            log.warning(
                "lifecycle_rules_refused: the bucket %s takes no lifecycle rules (%s), so nothing "
                "deletes old files. Add rules that expire generations/ and temp/ after %d days "
                "and uploads/ after %d.",
                self._bucket,
                why,
                self._keep_days,
                self._upload_days,
            )

    async def start_reading(self, seconds: float = 0.0) -> None:
        """Proves that files can be read. Arguments and errors are those of `prepare`."""
        await self._until(self._prove_readable, seconds)

    async def _until(self, prove: Callable[[], None], seconds: float) -> None:
        loop, attempt = asyncio.get_running_loop(), 0
        ends_at = loop.time() + seconds
        while True:
            left = max(ends_at - loop.time(), ATTEMPT_SECONDS)
            try:
                async with asyncio.timeout(left):
                    return await self._call(prove)
            except TimeoutError as error:
                fault = explain(urllib3.exceptions.TimeoutError(), self._access)
                raise StorageError(f"{fault}; given up after {seconds:g} s") from error
            except StorageError as error:
                fault = explain(error.__cause__, self._access)
                if fault.final:
                    raise SettingsError(f"{fault}{self._needs(error.__cause__)}") from error
                if loop.time() >= ends_at:
                    raise StorageError(f"{fault}; given up after {seconds:g} s") from error
                log.warning("object_store_not_ready, trying again: %s", fault)
            await asyncio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
            attempt += 1

    def _needs(self, error: BaseException | None) -> str:
        """Returns the permission that the key lacks. Only a denied put allows to name it."""
        denied = isinstance(error, S3Error) and error.code in DENIED
        return f": the key needs s3:PutObject in {self._bucket}" if denied else ""

    async def prove_writable(self) -> None:
        await self._call(self._prove_writable)

    async def prove_readable(self) -> None:
        await self._call(self._prove_readable)

    def _prove_writable(self) -> None:
        key = CHECK_KEY.format(uuid.uuid4())
        try:
            self._put(key, CHECK_DATA, "text/plain")
        except S3Error as error:
            if error.code != "NoSuchBucket":
                raise
            self._make_bucket()
            self._put(key, CHECK_DATA, "text/plain")
        try:
            if self._content(key) != CHECK_DATA:
                raise NotAStoreError("does not return the file that was stored")
        except S3Error as error:
            if error.code in MISSING:
                self._warn_once("a file that was stored is not found at once: links may return 404")
            elif error.code in DENIED:
                log.info("s3_key_cannot_read: %s", error.code)
            else:
                raise
        try:
            self._client.remove_object(self._bucket, key)
        except FAULTS as error:
            self._warn_once(
                "this key may not delete files, so those of failed jobs stay until the bucket "
                f"expires them: {explain(error, self._access).sentence}"
            )

    def _prove_readable(self) -> None:
        try:
            self._content(CHECK_KEY.format(uuid.uuid4()))
        except S3Error as error:
            if error.code in DENIED:
                self._warn_denied(error)
            elif error.code not in MISSING:
                raise
        else:
            raise NotAStoreError("returns a file that was never stored")

    @contextmanager
    def _open(self, key: str) -> Iterator[urllib3.BaseHTTPResponse]:
        response = self._client.get_object(self._bucket, key)
        try:
            yield response
        finally:
            response.close()
            response.release_conn()

    def _content(self, key: str) -> bytes:
        with self._open(key) as response:
            return response.read(len(CHECK_DATA) + 1)

    def _warn_denied(self, error: S3Error) -> None:
        self._warn_once(
            f"the store returns {error.code} for a file that is missing: without s3:ListBucket a "
            "missing file looks like one that this key may not read"
        )

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            log.warning("object_store_call_failed: %s", sentence)

    def _make_bucket(self) -> None:
        try:
            self._client.make_bucket(self._bucket, location=self._access.region)
        except FAULTS as error:
            code = error.code if isinstance(error, S3Error) else type(error).__name__
            if code in _MINE_ALREADY:  # Another role has created the bucket meanwhile.
                return
            if is_transient(error):
                raise
            raise NoBucketError(f"this key cannot create it ({code})") from error
        log.info("bucket_created: %s", self._bucket)

    def _make_rules(self) -> None:
        ours = [self._rule(folder) for folder in FOLDERS]
        there = self._rules()
        missing = [rule for rule in ours if _facts(rule) not in map(_facts, there)]
        if not missing:
            return
        ids = {rule.rule_id for rule in ours}
        others = [rule for rule in there if rule.rule_id not in ids]
        self._client.set_bucket_lifecycle(self._bucket, LifecycleConfig(others + ours))
        if not ids <= {rule.rule_id for rule in self._rules()}:
            raise MinioException("the store accepted the rules but does not list them")

    def _rules(self) -> list[Rule]:
        try:
            config = self._client.get_bucket_lifecycle(self._bucket)
        except S3Error as error:
            if error.code != _NO_RULES:
                raise
            return []
        return list(config.rules) if config else []

    def _rule(self, folder: str) -> Rule:
        return Rule(
            ENABLED,
            rule_filter=Filter(prefix=f"{folder}/"),
            rule_id=f"img2img-{folder}",
            expiration=Expiration(days=self._upload_days if folder == UPLOADS else self._keep_days),
        )

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        await self._call(lambda: self._put(key, data, media_type), key)

    def _put(self, key: str, data: bytes, media_type: str) -> None:
        result = self._client.put_object(
            self._bucket,
            key,
            BytesIO(data),
            len(data),
            content_type=media_type,
            metadata={"Cache-Control": CACHE_CONTROL},
            part_size=PART_BYTES,
        )
        self._compare_clocks(result.http_headers)

    def _compare_clocks(self, headers: Mapping[str, str]) -> None:
        skew = clock_skew(headers)
        if skew is not None:
            self._skew.note(skew)

    async def put_url(self, key: str, seconds: int) -> str:
        client, expires = self._public_client, timedelta(seconds=seconds)
        return await self._call(lambda: client.presigned_put_object(self._bucket, key, expires))

    async def stat(self, key: str) -> BlobInfo | None:
        return await self._call(lambda: self._stat(key))

    def _stat(self, key: str) -> BlobInfo | None:
        try:
            found = self._client.stat_object(self._bucket, key)
        except S3Error as error:
            if error.code in MISSING:
                return None
            # HEAD has no body in its response, so only GET reports a wrong key.
            return self._stat_by_get(key)
        return BlobInfo(key=key, size_bytes=found.size or 0, media_type=found.content_type or "")

    def _stat_by_get(self, key: str) -> BlobInfo | None:
        try:
            with self._open(key) as response:
                size = int(response.headers.get("Content-Length") or 0)
                media_type = response.headers.get("Content-Type") or ""
                return BlobInfo(key=key, size_bytes=size, media_type=media_type)
        except S3Error as error:
            if error.code in DENIED:
                self._warn_denied(error)
            elif error.code not in MISSING:
                raise
            return None

    async def read(self, key: str) -> AsyncIterator[bytes]:
        try:
            response = await self._call(lambda: self._client.get_object(self._bucket, key))
        except StorageError as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.code in MISSING | DENIED:
                raise KeyError(key) from error
            raise
        try:
            while chunk := await self._run(lambda: response.read(CHUNK_BYTES)):
                yield chunk
        except FAULTS as error:
            raise StorageError("the object store closed the connection") from error
        finally:
            response.close()
            response.release_conn()

    async def files(self, prefix: str) -> list[StoredFile]:
        """Returns the files directly below a prefix that ends with a slash. Raises StorageError."""
        return await self._call(lambda: self._files(prefix))

    def _files(self, prefix: str) -> list[StoredFile]:
        found = self._client.list_objects(self._bucket, prefix=prefix)
        return [
            StoredFile(each.object_name, each.etag or "", each.size or 0)
            for each in found
            if each.object_name and not each.is_dir
        ]

    async def save(self, key: str, file: Path) -> None:
        """Copies a file of the bucket to a file of this machine. Raises StorageError, OSError."""
        await self._call(lambda: self._save(key, file))

    def _save(self, key: str, file: Path) -> None:
        with self._open(key) as response, file.open("wb") as target:
            for chunk in response.stream(COPY_BYTES):
                target.write(chunk)

    async def delete(self, key: str) -> None:
        under_way = [future for future, its in list(self._putting.items()) if its == key]

        def remove() -> None:
            wait(under_way)
            self._client.remove_object(self._bucket, key)

        await self._call(remove)

    async def _run(self, work: Callable[[], T], putting: str = "") -> T:
        # The log context of the caller names the role and the job.
        future = self._pool.submit(copy_context().run, work)
        if putting:
            self._putting[future] = putting
            future.add_done_callback(self._putting.pop)
        return await asyncio.wrap_future(future)

    async def _call(self, work: Callable[[], T], putting: str = "") -> T:
        """Runs a call of the SDK on a thread. Raises StorageError.

        Args:
            putting: The key that the call stores, if any.
        """
        pauses = iter(REPEAT_SECONDS)
        while True:
            try:
                answer = await self._run(work, putting)
                STORE_CALLS.labels("ok").inc()
                return answer
            except FAULTS as error:
                STORE_CALLS.labels("failed" if is_transient(error) else "refused").inc()
                if isinstance(error, S3Error) and error.response is not None:
                    self._compare_clocks(error.response.headers)
                pause = next(pauses, None) if is_repeatable_refusal(error) else None
                if pause is None:
                    fault = explain(error, self._access)
                    raise StorageError(_sentence(error), str(fault), final=fault.final) from error
            await asyncio.sleep(pause)


def _sentence(error: Exception) -> str:
    # This message becomes a part of Job.error, so it names no host, path or key.
    if isinstance(error, S3Error):
        return f"the object store refused: {error.code}"
    return "the object store cannot be reached"


def _facts(rule: Rule) -> tuple[object, ...]:
    prefix = rule.rule_filter.prefix if rule.rule_filter else None
    days = rule.expiration.days if rule.expiration else None
    return rule.rule_id, rule.status, prefix, days


@asynccontextmanager
async def connect_blobs(settings: Settings) -> AsyncIterator[S3BlobStore]:
    """Opens the bucket of settings.s3_*; the first call connects. Call `prepare` before `put`.

    Raises:
        SettingsError: The endpoint, the region or the bucket cannot be used.
    """
    access = S3Access.from_settings(settings)
    connections = urllib3.PoolManager(
        maxsize=THREADS,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        retries=RETRIES,
    )
    client = access.client(connections)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="blobs")
    try:
        yield S3BlobStore(
            client,
            pool,
            access,
            keep_days=math.ceil(settings.retention_hours / 24),
            upload_days=math.ceil(settings.upload_hours / 24),
            public_client=access.public_client(settings.upload_endpoint_url, connections),
        )
    finally:
        # A store that does not respond occupies a thread for READ_SECONDS.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.to_thread(pool.shutdown, cancel_futures=True)
        connections.clear()
