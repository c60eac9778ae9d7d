"""Defines all streams and buckets with their limits, and creates or updates them."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Final

import nats.js.errors
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RePublish, RetentionPolicy, StorageType, StreamConfig

from img2img_server.errors import UnavailableError
from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.uploads import EXPIRED_SECONDS
from img2img_server.settings import SettingsError

_EXISTS_DIFFERENTLY: Final = 10058
_URL: Final = "IMG2IMG_NATS_URL"
# Error codes of permanent failures, each with the setting to correct: the server or the account has
# no JetStream, or there are fewer servers than replicas.
_FINAL: Final = {
    10039: _URL,
    10076: _URL,
    10005: "IMG2IMG_NATS_REPLICAS",
    10074: "IMG2IMG_NATS_REPLICAS",
}
_NO_STORAGE: Final = 10047
_PAUSE_SECONDS: Final = 1.0
_CONTRACT_SIDE_PIXELS: Final = 1024  # the largest side in the HTTP contract
_BYTES_OF_A_PIXEL: Final = 3
_STORED_BYTES: Final = 2**25  # no stream takes a larger message
_OTHER_FIELDS_BYTES: Final = 2**17  # at most, of an event or a queued job
HOUR: Final = 3600.0
# The bucket keeps a record longer than the service shows it, because clocks differ.
RECORD_MARGIN_SECONDS: Final = HOUR
# The queue keeps a job longer than its retention, so that an api ends it before.
QUEUE_MARGIN_SECONDS: Final = HOUR / 2
REQUEST_ID_SECONDS: Final = 24 * HOUR
WORKER_SECONDS: Final = 20.0
RATES_SECONDS: Final = 120.0  # longer than the minute in which a rate limit counts
USAGE_SECONDS: Final = 63 * 24 * HOUR  # a day longer than the API reports
STATES_SECONDS: Final = HOUR
STATES_BYTES: Final = 2**28  # of all suspended jobs
STATE_CHUNK_BYTES: Final = 2**18
DEAD_SECONDS: Final = 7 * 24 * HOUR
DEAD_MAX_BYTES: Final = 2**28
# Longer than all attempts at a webhook take together: 11 hours at most.
WEBHOOKS_SECONDS: Final = 24 * HOUR
WEBHOOK_REPEAT_SECONDS: Final = 600.0  # longer than a redelivery takes
# Within this time a repeated publish with the same Nats-Msg-Id is stored once.
REPEAT_SECONDS: Final = 20.0
# The calls that repeat a request may queue its job this long after one another.
JOB_REPEAT_SECONDS: Final = 120.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Limits of sizes, ages and times. `replicas`: copies of each stream and bucket."""

    queue_limit: int = 15
    retention_seconds: float = 24 * HOUR
    events_retention_seconds: float = HOUR
    events_max_bytes: int = 2**30
    webhook_limit: int = 10_000
    unserved_model_seconds: float = 0.0  # 0.0: models are listed for ever
    replicas: int = 1
    upload_seconds: float = 24 * HOUR

    @property
    def event_log_seconds(self) -> float:
        """Longer than a job waits and runs, and its log is then kept."""
        return self.retention_seconds + RECORD_MARGIN_SECONDS + self.events_retention_seconds


def streams(bounds: Bounds) -> list[StreamConfig]:
    """Returns the configurations of all streams, buckets included."""
    return [
        StreamConfig(
            name=subjects.JOBS,
            description="Unfinished jobs; the ack of a worker removes a job.",
            subjects=[subjects.ALL_JOBS],
            retention=RetentionPolicy.WORK_QUEUE,
            discard=DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=bounds.queue_limit,
            # After the retention, the apis end the jobs that are still there.
            max_age=bounds.retention_seconds + QUEUE_MARGIN_SECONDS,
            duplicate_window=min(bounds.retention_seconds, JOB_REPEAT_SECONDS),
        ),
        StreamConfig(
            name=subjects.PERMITS,
            description="One message for each unfinished job of a tenant: its job id.",
            subjects=["img2img.permits.*"],
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=bounds.queue_limit,
            # Longer than a job is kept in the queue.
            max_age=bounds.retention_seconds + RECORD_MARGIN_SECONDS,
            allow_direct=True,
            duplicate_window=REPEAT_SECONDS,
        ),
        StreamConfig(
            name=subjects.EVENTS,
            description="Numbered events by job; a preview replaces the one before.",
            subjects=[subjects.EVENTS_SUBJECT],
            retention=RetentionPolicy.LIMITS,
            # Logs are removed after the end of their jobs. This age is for logs without an end.
            max_age=bounds.event_log_seconds,
            max_bytes=bounds.events_max_bytes,
            allow_rollup_hdrs=True,
            allow_direct=True,
            republish=RePublish(
                src=subjects.EVENTS_SUBJECT, dest=subjects.NOTICES_SUBJECT, headers_only=True
            ),
            duplicate_window=REPEAT_SECONDS,
        ),
        StreamConfig(
            name=subjects.EVENT_USE,
            description="The bytes of ended event logs by tenant.",
            subjects=[subjects.EVENT_USE_SUBJECT],
            retention=RetentionPolicy.LIMITS,
            max_age=bounds.event_log_seconds,
            allow_direct=True,
            duplicate_window=REPEAT_SECONDS,
        ),
        StreamConfig(
            name=subjects.STATES,
            description="States of suspended jobs in chunks, until a worker continues them.",
            subjects=[subjects.STATES_SUBJECT],
            retention=RetentionPolicy.LIMITS,
            # If there is no room, a job starts again. A limit of bytes would reserve them.
            discard=DiscardPolicy.NEW,
            max_msgs=STATES_BYTES // STATE_CHUNK_BYTES,
            max_age=min(STATES_SECONDS, bounds.retention_seconds),
            allow_direct=True,
            duplicate_window=min(bounds.retention_seconds, REPEAT_SECONDS),
        ),
        StreamConfig(
            name=subjects.DEAD,
            description="Jobs that can never run, without their images. A header has the reason.",
            subjects=["img2img.dead.>"],
            retention=RetentionPolicy.LIMITS,
            max_age=DEAD_SECONDS,
            max_bytes=DEAD_MAX_BYTES,
            duplicate_window=REPEAT_SECONDS,
        ),
        StreamConfig(
            name=subjects.WEBHOOKS,
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
            name=subjects.IDS,
            description="Job ids by tenant: the sequence of a message is the id of a job.",
            # The subject without a tenant is for apis of an older version during a rolling update.
            subjects=["img2img.ids", "img2img.ids.*"],
            retention=RetentionPolicy.LIMITS,
            # A job may wait for one retention period and run, and is then kept for another one.
            max_age=2 * bounds.retention_seconds + RECORD_MARGIN_SECONDS,
            allow_direct=True,
            duplicate_window=REPEAT_SECONDS,
        ),
        _bucket(subjects.RECORDS_BUCKET, bounds.retention_seconds + RECORD_MARGIN_SECONDS),
        # Events are not kept longer than the record of their job.
        _bucket(subjects.REQUESTS_BUCKET, min(REQUEST_ID_SECONDS, bounds.retention_seconds)),
        _bucket(subjects.WORKERS_BUCKET, WORKER_SECONDS),
        _bucket(subjects.MODELS_BUCKET, bounds.unserved_model_seconds),
        _bucket(subjects.STORAGE_BUCKET, 0.0),
        _bucket(subjects.RATES_BUCKET, RATES_SECONDS),
        _bucket(subjects.USAGE_BUCKET, USAGE_SECONDS),
        _bucket(subjects.UPLOADS_BUCKET, bounds.upload_seconds + EXPIRED_SECONDS),
        # A job that was accepted with this version may wait this long.
        _bucket(subjects.RETIRED_STORAGE_BUCKET, bounds.retention_seconds + RECORD_MARGIN_SECONDS),
    ]


def _bucket(name: str, ttl_seconds: float) -> StreamConfig:
    # This is the layout of the NATS clients, so `nats kv` reads the bucket.
    return StreamConfig(
        name=subjects.bucket_stream(name),
        subjects=[subjects.key_subject(name, ">")],
        retention=RetentionPolicy.LIMITS,
        discard=DiscardPolicy.NEW,
        max_msgs_per_subject=1,
        max_age=ttl_seconds,
        allow_rollup_hdrs=True,
        allow_direct=True,
        deny_delete=True,
        duplicate_window=min(ttl_seconds or REPEAT_SECONDS, REPEAT_SECONDS),
    )


def needed_payload_bytes(max_side_pixels: int) -> int:
    """Returns the size of the largest message: an image of that side that does not compress."""
    side = max(max_side_pixels, _CONTRACT_SIDE_PIXELS)
    return min(_BYTES_OF_A_PIXEL * side**2 + _OTHER_FIELDS_BYTES, _STORED_BYTES)


async def prepare(link: NatsConnection, bounds: Bounds, ends_at: float = 0.0) -> None:
    """Creates or updates all streams and buckets.

    Args:
        ends_at: Monotonic time until which attempts are repeated while JetStream is not ready.

    Raises:
        SettingsError: NATS refuses a stream; the sentence names the setting.
        UnavailableError: JetStream is not ready in time.
    """
    while True:
        try:
            return await link.unless_denied(_prepare(link, bounds))
        except UnavailableError as error:
            cause = error.__cause__
            why = getattr(cause, "description", "") or "JetStream does not respond"
            sentence = f"{_URL}: the NATS server at {link.nc.attempted} is not ready: {why}"
            if getattr(cause, "err_code", 0) == _NO_STORAGE:
                sentence += f" (IMG2IMG_EVENTS_MAX_BYTES reserves {bounds.events_max_bytes} bytes)"
            if time.monotonic() > ends_at:
                raise UnavailableError(f"{sentence}; given up") from error
            log.warning("jetstream_not_ready, trying again: %s", sentence)
        await asyncio.sleep(_PAUSE_SECONDS)


async def _prepare(link: NatsConnection, bounds: Bounds) -> None:
    if not await link.has_jetstream():
        raise SettingsError(_refusal(link, _URL, "JetStream is not enabled there"))
    for config in streams(bounds):
        config.storage = StorageType.FILE
        config.num_replicas = bounds.replicas
        try:
            await link.ask(partial(_ensure, link.js, config))
        except (nats.js.errors.APIError, UnavailableError) as error:
            said = error.__cause__ if isinstance(error, UnavailableError) else error
            if isinstance(said, nats.js.errors.APIError):
                setting = _FINAL.get(said.err_code or 0)
                if setting or said is error:
                    why = f"it refused the stream {config.name}: {said.description}"
                    raise SettingsError(_refusal(link, setting or _URL, why)) from error
            raise


def _refusal(link: NatsConnection, setting: str, why: str) -> str:
    return f"{setting}: the NATS server at {link.nc.attempted} cannot be used: {why}"


async def _ensure(js: JetStreamContext, config: StreamConfig) -> None:
    try:
        await js.add_stream(config)
    except nats.js.errors.BadRequestError as error:
        if error.err_code != _EXISTS_DIFFERENTLY:
            raise
        if config.retention is RetentionPolicy.WORK_QUEUE:
            # With a lower limit, NATS would remove messages that wait to be processed.
            there = (await js.stream_info(config.name or "")).config.max_msgs_per_subject or 0
            config.max_msgs_per_subject = max(config.max_msgs_per_subject or 0, there)
        await js.update_stream(config)
