"""Everything that the roles share through NATS, on one connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from img2img_server.interfaces.queue import Control, EventLog, JobQueue, Permits
from img2img_server.interfaces.records import JobStore, WorkerRegistry
from img2img_server.interfaces.states import JobStates
from img2img_server.interfaces.webhooks import WebhookOutbox
from img2img_server.lifecycle import unless_stopped
from img2img_server.nats.access import NatsAccess
from img2img_server.nats.connection import RECONNECT_WAIT_SECONDS, connect
from img2img_server.nats.control import NatsControl
from img2img_server.nats.event_use import EventUse
from img2img_server.nats.events import JetStreamEventLog
from img2img_server.nats.jobs import JetStreamJobQueue
from img2img_server.nats.key_uses import KeyUses, kv_key_uses
from img2img_server.nats.permits import JetStreamPermits
from img2img_server.nats.probe import Probe
from img2img_server.nats.rates import Rates, kv_rates
from img2img_server.nats.records import KvJobStore
from img2img_server.nats.states import JetStreamStates
from img2img_server.nats.tenant_settings import TenantStorage, kv_tenant_storage
from img2img_server.nats.topology import HOUR, Bounds, needed_payload_bytes, prepare
from img2img_server.nats.uploads import UploadRecords, kv_uploads
from img2img_server.nats.usage import UsageLedger, kv_usage
from img2img_server.nats.webhooks import JetStreamWebhookOutbox
from img2img_server.nats.workers import KvWorkerRegistry
from img2img_server.settings import Settings
from img2img_server.storage.vault import Vault


async def _is_ready(_: float) -> None: ...


async def _is_writable() -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bus:
    """The queue, event logs, job records and settings that the roles share."""

    queue: JobQueue
    permits: Permits
    events: EventLog
    control: Control
    jobs: JobStore
    workers: WorkerRegistry
    outbox: WebhookOutbox
    storage: TenantStorage
    rates: Rates
    usage: UsageLedger
    key_uses: KeyUses
    states: JobStates
    uploads: UploadRecords
    # Waits at most that many seconds until NATS can be used. Raises UnavailableError.
    ready: Callable[[float], Coroutine[Any, Any, None]] = _is_ready
    # Tests whether NATS stores messages, for `trouble`, and compares the clocks.
    probe: Callable[[], Coroutine[Any, Any, None]] = _is_writable
    # Returns why NATS cannot be used now; empty while it can.
    trouble: Callable[[], str] = lambda: ""


@asynccontextmanager
async def connect_bus(
    settings: Settings,
    *,
    name: str = "img2img",
    reconnect_wait_seconds: float = RECONNECT_WAIT_SECONDS,
    stop: asyncio.Event | None = None,
) -> AsyncIterator[Bus]:
    """Connects to settings.nats_url and creates missing streams and buckets.

    The connection reconnects by itself; while it is lost, all methods raise UnavailableError.

    Args:
        name: Identifies the connection in the server's monitoring.
        reconnect_wait_seconds: How long a call waits for a lost connection.
        stop: Ends the attempts to connect with StoppedError.

    Raises:
        UnavailableError: No usable NATS within settings.startup_timeout_seconds.
        SettingsError: A storage key is malformed, or NATS refuses the settings.
    """
    vault = Vault(settings.storage_keys.get_secret_value())
    ends_at = time.monotonic() + settings.startup_timeout_seconds
    async with connect(
        NatsAccess.from_settings(settings),
        name=name,
        reconnect_wait_seconds=reconnect_wait_seconds,
        connect_seconds=settings.startup_timeout_seconds,
        stop=stop,
    ) as link:
        link.check_max_payload(needed_payload_bytes(settings.max_side_pixels))
        await unless_stopped(stop, prepare(link, _bounds(settings), ends_at))
        probe = Probe(link)
        await unless_stopped(stop, probe())
        yield Bus(
            queue=JetStreamJobQueue(
                link, limit=settings.queue_limit, ack_wait_seconds=settings.ack_wait_seconds
            ),
            permits=JetStreamPermits(link, limit=settings.queue_limit),
            events=JetStreamEventLog(
                link,
                EventUse(
                    link,
                    retention_seconds=settings.events_retention_seconds,
                    max_bytes=settings.events_max_bytes,
                ),
            ),
            control=NatsControl(link),
            jobs=KvJobStore(link, retention_seconds=settings.retention_hours * HOUR),
            workers=KvWorkerRegistry(link),
            outbox=JetStreamWebhookOutbox(link),
            storage=kv_tenant_storage(link, vault),
            rates=kv_rates(link),
            usage=kv_usage(link),
            key_uses=kv_key_uses(link),
            states=JetStreamStates(link),
            uploads=kv_uploads(link),
            trouble=lambda: link.trouble or probe.trouble,
            ready=link.ready,
            probe=probe,
        )


def _bounds(settings: Settings) -> Bounds:
    return Bounds(
        queue_limit=settings.queue_limit,
        retention_seconds=settings.retention_hours * HOUR,
        events_retention_seconds=settings.events_retention_seconds,
        events_max_bytes=settings.events_max_bytes,
        unserved_model_seconds=settings.unserved_model_hours * HOUR,
        replicas=settings.nats_replicas,
        upload_seconds=settings.upload_hours * HOUR,
    )
