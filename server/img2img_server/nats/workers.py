"""Announcements of workers and models in key-value buckets."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.kv import Bucket, KvEntry

T = TypeVar("T")

log = logging.getLogger(__name__)


class KvWorkerRegistry:
    """A WorkerRegistry on JetStream. Every method raises UnavailableError when NATS is down.

    A worker expires 20 s after its last announcement, a model when no worker has announced it for
    the time of a setting (topology.py).
    """

    def __init__(self, link: NatsConnection) -> None:
        self._workers = Bucket(link, subjects.WORKERS_BUCKET)
        self._models = Bucket(link, subjects.MODELS_BUCKET)

    async def announce(self, worker: WorkerInfo) -> None:
        if worker.serves:
            await self._models.put(subjects.token(worker.model.name), codec.encode(worker.model))
        await self._workers.put(subjects.token(worker.name), codec.encode(worker))

    async def withdraw(self, name: str) -> None:
        await self._workers.remove(subjects.token(name))

    async def workers(self) -> list[WorkerInfo]:
        return [worker for worker in await self.announced() if worker.serves]

    async def announced(self) -> list[WorkerInfo]:
        found = await _all(self._workers, WorkerInfo)
        return sorted(found, key=lambda worker: worker.name)

    async def names(self) -> set[str]:
        return {worker.name for worker in await _all(self._workers, WorkerInfo)}

    async def models(self) -> list[ModelInfo]:
        return sorted(await _all(self._models, ModelInfo), key=lambda model: model.name)

    async def model(self, name: str) -> ModelInfo | None:
        entry = await self._models.get(subjects.token(name))
        return _decoded(entry, ModelInfo) if entry else None


async def _all(bucket: Bucket, kind: type[T]) -> list[T]:
    entries = await asyncio.gather(*(bucket.get(key) for key in await bucket.keys()))
    # A key may expire between the two reads.
    found = [_decoded(entry, kind) for entry in entries if entry is not None]
    return [value for value in found if value is not None]


def _decoded(entry: KvEntry, kind: type[T]) -> T | None:
    """Decodes an announcement; None for one of an incompatible version."""
    try:
        return codec.decode(entry.value, kind)
    except codec.UndecodableError as error:
        log.warning("undecodable_announcement_ignored: %s", error)
        return None
