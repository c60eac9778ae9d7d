"""States of suspended jobs in memory."""

from __future__ import annotations

import uuid

from img2img_server.interfaces.states import StateTooLargeError


class MemoryStates:
    """A JobStates in memory.

    Args:
        most_bytes: Most bytes of a state.
    """

    def __init__(self, most_bytes: int = 2**26) -> None:
        self._most_bytes = most_bytes
        self.stored: dict[str, bytes] = {}

    async def save(self, job_id: int, data: bytes) -> str:
        if len(data) > self._most_bytes:
            raise StateTooLargeError(f"it has {len(data)} bytes, more than {self._most_bytes}")
        key = f"{job_id}-{uuid.uuid4().hex}"
        self.stored[key] = data
        return key

    async def load(self, key: str, size: int) -> bytes | None:
        return self.stored.get(key)

    async def remove(self, key: str) -> None:
        self.stored.pop(key, None)
