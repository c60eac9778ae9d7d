"""Every stream and bucket with its bounds, made or brought up to date when a role connects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig

from img2img_server.wire import names
from img2img_server.wire.connection import Link

_EXISTS_DIFFERENTLY: Final = 10058
HOUR: Final = 3600.0
# The bucket keeps a record longer than it is shown: clocks differ, and the shown time counts.
RECORD_MARGIN_SECONDS: Final = HOUR
REQUEST_ID_SECONDS: Final = 24 * HOUR
WORKER_SECONDS: Final = 20.0
RATES_SECONDS: Final = 120.0  # longer than the minute that is counted
DEAD_SECONDS: Final = 7 * 24 * HOUR
DEAD_MAX_BYTES: Final = 2**28
# Longer than all attempts at a webhook take together: 11 hours at most.
WEBHOOKS_SECONDS: Final = 24 * HOUR
WEBHOOK_REPEAT_SECONDS: Final = 600.0  # as REPEAT_SECONDS; a worker's death lies within it
# Within this time a repeated publish with the same Nats-Msg-Id is stored once.
REPEAT_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much is kept and for how long. `replicas`: copies of everything."""

    queue_limit: int = 15
    retention_seconds: float = 24 * HOUR
    events_retention_seconds: float = HOUR
    events_max_bytes: int = 2**30
    webhook_limit: int = 10_000
    replicas: int = 1


def streams(bounds: Bounds) -> list[StreamConfig]:
    """The configurations of all streams, buckets included."""
    return [
        StreamConfig(
            name=names.JOBS,
            description="Jobs no worker has finished; each is removed by its ack.",
            subjects=["img2img.jobs.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            discard=DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=bounds.queue_limit,
            max_age=bounds.retention_seconds,
            duplicate_window=REPEAT_SECONDS,
        ),
        StreamConfig(
            name=names.EVENTS,
            description="Numbered events by job; a preview replaces the one before.",
            subjects=["img2img.events.>"],
            retention=RetentionPolicy.LIMITS,
            max_age=bounds.events_retention_seconds,
            max_bytes=bounds.events_max_bytes,
            allow_rollup_hdrs=True,
            allow_direct=True,
            duplicate_window=REPEAT_SECONDS,
        ),
        StreamConfig(
            name=names.DEAD,
            description="Jobs that can never work, without their images; the reason in a header.",
            subjects=["img2img.dead.>"],
            retention=RetentionPolicy.LIMITS,
            max_age=DEAD_SECONDS,
            max_bytes=DEAD_MAX_BYTES,
            duplicate_window=REPEAT_SECONDS,
        ),
        StreamConfig(
            name=names.WEBHOOKS,
            description="Webhooks of ended jobs; each is removed when delivered or given up.",
            subjects=["img2img.webhooks.>"],
            retention=RetentionPolicy.WORK_QUEUE,
            discard=DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=bounds.webhook_limit,
            max_age=WEBHOOKS_SECONDS,
            duplicate_window=WEBHOOK_REPEAT_SECONDS,
        ),
        StreamConfig(
            name=names.IDS,
            description="The sequence of the last message is the last job id drawn.",
            subjects=[names.IDS_SUBJECT],
            retention=RetentionPolicy.LIMITS,
            max_msgs=1,
            duplicate_window=REPEAT_SECONDS,
        ),
        _bucket(names.RECORDS_BUCKET, bounds.retention_seconds + RECORD_MARGIN_SECONDS),
        # Never longer than the record of its job.
        _bucket(names.REQUESTS_BUCKET, min(REQUEST_ID_SECONDS, bounds.retention_seconds)),
        _bucket(names.WORKERS_BUCKET, WORKER_SECONDS),
        _bucket(names.MODELS_BUCKET, 0.0),
        _bucket(names.STORAGE_BUCKET, 0.0),
        _bucket(names.RATES_BUCKET, RATES_SECONDS),
        _bucket(names.PUT_OFF_BUCKET, WEBHOOKS_SECONDS),
        # As long as a job may wait that was accepted when it was current.
        _bucket(names.RETIRED_STORAGE_BUCKET, bounds.retention_seconds + RECORD_MARGIN_SECONDS),
    ]


def _bucket(name: str, ttl_seconds: float) -> StreamConfig:
    # As the NATS clients lay out a key-value bucket, so that `nats kv` reads it.
    return StreamConfig(
        name=names.bucket_stream(name),
        subjects=[names.key_subject(name, ">")],
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW,
        max_msgs_per_subject=1,
        max_age=ttl_seconds,
        allow_rollup_hdrs=True,
        allow_direct=True,
        deny_delete=True,
        duplicate_window=min(ttl_seconds or REPEAT_SECONDS, REPEAT_SECONDS),
    )


async def prepare(link: Link, bounds: Bounds) -> None:
    """Makes or updates every stream and bucket. Raises UnavailableError."""
    for config in streams(bounds):
        config.storage = StorageType.FILE
        config.num_replicas = bounds.replicas
        await link.ask(partial(_ensure, link.js, config))


async def _ensure(js: JetStreamContext, config: StreamConfig) -> None:
    try:
        await js.add_stream(config)
    except nats.js.errors.BadRequestError as error:
        if error.err_code != _EXISTS_DIFFERENTLY:
            raise
        await js.update_stream(config)
