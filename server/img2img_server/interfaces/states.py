"""The store of the states of suspended jobs."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

from img2img_server.domain.job import Suspended
from img2img_server.errors import UnavailableError


class StateTooLargeError(Exception):
    """There is no room for the state of a job. The message says why."""


class JobStates(Protocol):
    """States of suspended jobs, by keys that are never used again.

    The record of a job has the key of its state and its SHA-256. The worker that continues the job
    removes its state, as does the end of the job; a state that is left expires after an hour. Every
    method raises UnavailableError when NATS is down.
    """

    async def save(self, job_id: int, data: bytes) -> str:
        """Stores a state and returns its key.

        Raises:
            StateTooLargeError: the state, or all states together, would have too many bytes.
        """
        ...

    async def load(self, key: str, size: int) -> bytes | None:
        """Returns a state of `size` bytes; None if it was removed. The caller checks its hash."""
        ...

    async def remove(self, key: str) -> None:
        """Removes a state, if it is there."""
        ...


async def remove_state(states: JobStates, suspended: Suspended | None) -> None:
    """Removes the state of a job that has ended or continues. Without NATS, it expires."""
    if suspended is not None:
        with suppress(UnavailableError):
            await states.remove(suspended.key)
