"""Files in any S3 bucket, through the minio SDK on a few threads of its own."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import asynccontextmanager
from io import BytesIO
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.commonconfig import ENABLED, Filter
from minio.error import MinioException, S3Error
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

from img2img_server.errors import StorageError
from img2img_server.settings import Settings
from img2img_server.store.base import BlobInfo

CHUNK_BYTES: Final = 64 * 1024
PART_BYTES: Final = 64 * 2**20  # one request a file: what we store is far smaller
THREADS: Final = 8
TRIES: Final = 3
FIRST_PAUSE_SECONDS: Final = 0.2
CONNECT_SECONDS: Final = 3.0
READ_SECONDS: Final = 30.0
FOLDERS: Final = ("generations", "temp")

_FAULTS: Final = (MinioException, urllib3.exceptions.HTTPError, OSError)
_MISSING: Final = frozenset({"NoSuchKey", "NoSuchObject", "NoSuchBucket"})
_MINE_ALREADY: Final = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})
_NO_RULES: Final = "NoSuchLifecycleConfiguration"
# What another try may mend; any other refusal is an answer.
_TRANSIENT: Final = frozenset(
    {"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"}
)

T = TypeVar("T")
log = logging.getLogger(__name__)


class S3BlobStore:
    """A BlobStore in one bucket; made by `connect_blobs`."""

    def __init__(
        self, client: Minio, pool: ThreadPoolExecutor, *, bucket: str, region: str, keep_days: int
    ) -> None:
        self._client = client
        self._pool = pool
        self._bucket = bucket
        self._region = region
        self._keep_days = keep_days
        self._putting: dict[Future[Any], str] = {}  # a thread goes on when its caller is cancelled
        # A key is never written twice with different content: it holds a UUID.
        self._cache_control = f"private, max-age={keep_days * 86400}, immutable"

    async def prepare(self) -> None:
        await self._try(self._make_bucket)
        await self._try(self._make_rules)

    def _make_bucket(self) -> None:
        if self._client.bucket_exists(self._bucket):
            return
        try:
            self._client.make_bucket(self._bucket, location=self._region)
        except S3Error as error:  # another role was quicker
            if error.code not in _MINE_ALREADY:
                raise

    def _make_rules(self) -> None:
        ours = [self._rule(folder) for folder in FOLDERS]
        there = self._rules()
        missing = [rule for rule in ours if _facts(rule) not in map(_facts, there)]
        if not missing:
            return
        ids = {rule.rule_id for rule in ours}
        others = [rule for rule in there if rule.rule_id not in ids]
        self._client.set_bucket_lifecycle(self._bucket, LifecycleConfig(others + ours))

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
            expiration=Expiration(days=self._keep_days),
        )

    async def put(self, key: str, data: bytes, media_type: str) -> None:
        def store() -> None:
            self._client.put_object(
                self._bucket,
                key,
                BytesIO(data),
                len(data),
                content_type=media_type,
                metadata={"Cache-Control": self._cache_control},
                part_size=PART_BYTES,
            )

        await self._try(store, putting=key)

    async def stat(self, key: str) -> BlobInfo | None:
        def look() -> BlobInfo | None:
            try:
                found = self._client.stat_object(self._bucket, key)
            except S3Error as error:
                if error.code not in _MISSING:
                    raise
                return None
            return BlobInfo(
                key=key, size_bytes=found.size or 0, media_type=found.content_type or ""
            )

        return await self._try(look)

    async def read(self, key: str) -> AsyncIterator[bytes]:
        try:
            response = await self._try(lambda: self._client.get_object(self._bucket, key))
        except StorageError as error:
            if isinstance(error.__cause__, S3Error) and error.__cause__.code in _MISSING:
                raise KeyError(key) from error
            raise
        try:
            while chunk := await self._run(lambda: response.read(CHUNK_BYTES)):
                yield chunk
        except _FAULTS as error:
            raise StorageError("the object store broke off") from error
        finally:
            response.close()
            response.release_conn()

    async def delete(self, key: str) -> None:
        under_way = [future for future, its in list(self._putting.items()) if its == key]

        def remove() -> None:
            wait(under_way)
            self._client.remove_object(self._bucket, key)

        await self._try(remove)

    async def _run(self, work: Callable[[], T], putting: str = "") -> T:
        future = self._pool.submit(work)
        if putting:
            self._putting[future] = putting
            future.add_done_callback(self._putting.pop)
        return await asyncio.wrap_future(future)

    async def _try(self, work: Callable[[], T], *, putting: str = "") -> T:
        """Runs it on a thread, again after a pause when the fault may pass. Raises StorageError.

        Args:
            putting: the key that it stores, if any.
        """
        for left in reversed(range(TRIES)):
            try:
                return await self._run(work, putting)
            except _FAULTS as error:
                final = isinstance(error, S3Error) and error.code not in _TRANSIENT
                if final or not left:
                    raise StorageError(_sentence(error)) from error
                log.warning("object store, %d tries left: %s", left, error)
                pause = FIRST_PAUSE_SECONDS * 4 ** (TRIES - 1 - left)
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
        raise AssertionError("unreachable")


def _sentence(error: Exception) -> str:
    # Becomes Job.error: no host, path or key in it.
    if isinstance(error, S3Error):
        return f"the object store refused: {error.code}"
    return "the object store cannot be reached"


def _facts(rule: Rule) -> tuple[object, ...]:
    prefix = rule.rule_filter.prefix if rule.rule_filter else None
    days = rule.expiration.days if rule.expiration else None
    return rule.rule_id, rule.status, prefix, days


def minio_client(settings: Settings, connections: urllib3.PoolManager) -> Minio:
    """A client of settings.s3_*; connects with the first call.

    Raises:
        StorageError: the endpoint is not an http or https address.
    """
    endpoint = urlsplit(settings.s3_endpoint_url)
    if endpoint.scheme not in ("http", "https") or not endpoint.netloc:
        raise StorageError("s3_endpoint_url must be an http or https address")
    return Minio(
        endpoint.netloc,
        access_key=settings.s3_access_key.get_secret_value() or None,
        secret_key=settings.s3_secret_key.get_secret_value() or None,
        secure=endpoint.scheme == "https",
        region=settings.s3_region,
        http_client=connections,
    )


@asynccontextmanager
async def connect_blobs(settings: Settings) -> AsyncIterator[S3BlobStore]:
    """The bucket of settings.s3_*; connects with the first call. Call `prepare` before `put`.

    Raises:
        StorageError: the endpoint is not an http or https address.
    """
    connections = urllib3.PoolManager(
        maxsize=THREADS,
        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
        retries=False,
    )
    client = minio_client(settings, connections)
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="blobs")
    try:
        yield S3BlobStore(
            client,
            pool,
            bucket=settings.s3_bucket,
            region=settings.s3_region,
            keep_days=math.ceil(settings.retention_hours / 24),
        )
    finally:
        await asyncio.to_thread(pool.shutdown, cancel_futures=True)
        connections.clear()
