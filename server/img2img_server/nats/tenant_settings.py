"""Storage details of tenants, encrypted; each version is kept as long as jobs may need it."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass

from img2img_server.domain.storage import REALTIME, StorageDetails
from img2img_server.nats import codec, subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KeyValue
from img2img_server.storage.vault import SealBrokenError, Vault

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Record:
    version: str
    # All of StorageDetails is encrypted, since a public address would identify the tenant.
    sealed: bytes


class TenantStorage:
    """Details by tenant and server type.

    A job keeps the version that was current when it was accepted. A version that is replaced or
    reset moves to a second bucket, which keeps it as long as such jobs may run. Every method raises
    UnavailableError when NATS is down. Methods that read also raise SealBrokenError.
    """

    def __init__(self, vault: Vault, current: KeyValue, retired: KeyValue) -> None:
        self._vault = vault
        self._current = current
        self._retired = retired

    @property
    def can_store(self) -> bool:
        """Whether there is a key to encrypt with."""
        return not self._vault.is_empty

    async def current(self, tenant: str) -> tuple[str, StorageDetails] | None:
        """Returns the version and the details of the tenant's realtime jobs, or None."""
        entry = await self._current.get(_key(tenant, REALTIME))
        if entry is None:
            return None
        record = codec.decode(entry.value, _Record)
        return record.version, self._open(record)

    async def get(self, tenant: str, version: str) -> StorageDetails | None:
        """Returns one version, also when it was replaced or reset; None when it has expired."""
        entry = await self._current.get(_key(tenant, REALTIME))
        if entry is None or codec.decode(entry.value, _Record).version != version:
            entry = await self._retired.get(_key(tenant, version))
        return self._open(codec.decode(entry.value, _Record)) if entry else None

    async def put(self, tenant: str, deploy_type: str, details: StorageDetails) -> str:
        """Replaces the stored details and returns the new version. Call only if `can_store`."""
        record = _Record(uuid.uuid4().hex, self._vault.seal(codec.encode(details)))
        key = _key(tenant, deploy_type)
        while True:
            there = await self._retire(tenant, key)
            try:
                await self._current.swap(key, codec.encode(record), there)
            except WrongLastSequenceError:
                continue  # Another api has written a version meanwhile; this one replaces it.
            return record.version

    async def remove(self, tenant: str, deploy_type: str) -> None:
        """Removes the details, if there are any."""
        key = _key(tenant, deploy_type)
        await self._retire(tenant, key)
        await self._current.remove(key)

    async def rotate(self) -> None:
        """Encrypts all current versions again with the first key, so that older keys can be
        removed.

        Retired versions are not encrypted again: they expire soon.
        """
        for key in await self._current.keys():
            entry = await self._current.get(key)
            if entry is None:
                continue
            record = codec.decode(entry.value, _Record)
            try:
                if self._vault.is_empty or self._vault.is_current(record.sealed):
                    continue
                sealed = self._vault.seal(self._vault.open(record.sealed))
                changed = codec.encode(_Record(record.version, sealed))
                await self._current.swap(key, changed, entry.revision)
            except WrongLastSequenceError:
                continue  # The key was written meanwhile, so it is encrypted with the first key.
            except SealBrokenError:
                log.warning("storage_details_undecryptable: no key fits %s", key)

    async def _retire(self, tenant: str, key: str) -> int:
        """Copies the current version to the bucket of old versions. Returns its revision, 0 if
        there is none.
        """
        entry = await self._current.get(key)
        if entry is None:
            return 0
        record = codec.decode(entry.value, _Record)
        await self._retired.put(_key(tenant, record.version), entry.value)
        return entry.revision

    def _open(self, record: _Record) -> StorageDetails:
        return codec.decode(self._vault.open(record.sealed), StorageDetails)


def kv_tenant_storage(link: NatsConnection, vault: Vault) -> TenantStorage:
    """Creates the storage details on JetStream; topology.py sets how long versions are kept."""
    return TenantStorage(
        vault, Bucket(link, subjects.STORAGE_BUCKET), Bucket(link, subjects.RETIRED_STORAGE_BUCKET)
    )


def _key(tenant: str, rest: str) -> str:
    return f"{subjects.token(tenant)}.{subjects.token(rest)}"
