"""A Bus in memory, without NATS."""

from __future__ import annotations

from img2img_server.nats.bus import Bus
from img2img_server.nats.key_uses import KeyUses
from img2img_server.nats.rates import Rates
from img2img_server.nats.tenant_settings import TenantStorage
from img2img_server.nats.uploads import UploadRecords
from img2img_server.nats.usage import UsageLedger
from img2img_server.storage.vault import Vault
from img2img_server.testing.memory_control import MemoryControl
from img2img_server.testing.memory_events import MemoryEventLog
from img2img_server.testing.memory_queue import MemoryJobQueue, MemoryPermits
from img2img_server.testing.memory_records import (
    MemoryBucket,
    MemoryJobStore,
    MemoryWorkerRegistry,
)
from img2img_server.testing.memory_states import MemoryStates
from img2img_server.testing.memory_webhooks import MemoryWebhookOutbox


def memory_bus(
    *, queue_limit: int = 15, ack_wait_seconds: float = 15.0, storage_keys: str = ""
) -> Bus:
    """Returns a Bus whose parts are all in memory."""
    permits = MemoryPermits(limit=queue_limit)
    queue = MemoryJobQueue(limit=queue_limit, ack_wait_seconds=ack_wait_seconds, permits=permits)
    return Bus(
        queue=queue,
        permits=permits,
        events=MemoryEventLog(),
        control=MemoryControl(),
        jobs=MemoryJobStore(),
        workers=MemoryWorkerRegistry(),
        outbox=MemoryWebhookOutbox(),
        storage=memory_tenant_storage(Vault(storage_keys)),
        rates=memory_rates(),
        usage=UsageLedger(MemoryBucket()),
        key_uses=KeyUses(MemoryBucket()),
        states=MemoryStates(),
        uploads=UploadRecords(MemoryBucket()),
    )


def memory_rates() -> Rates:
    """Returns rate limits in memory."""
    return Rates(MemoryBucket())


def memory_tenant_storage(vault: Vault) -> TenantStorage:
    """Returns the storage settings of tenants in memory."""
    return TenantStorage(vault, MemoryBucket(), MemoryBucket())
