"""Writes that are collected and made together, because single ones would be too many messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from img2img_server.errors import UnavailableError

log = logging.getLogger(__name__)


class WriteLater:
    """Calls `write` some seconds after the first change, and again while it leaves changes.

    A process that is killed loses the changes that it has not written.
    """

    def __init__(
        self,
        name: str,
        seconds: float,
        write: Callable[[], Awaitable[None]],
        is_needed: Callable[[], bool],
    ) -> None:
        """Args:
        name: The name of the values, for the log.
        write: Writes all changes. Raises UnavailableError and keeps what it has not written.
        is_needed: Returns whether there are changes.
        """
        self._name = name
        self._seconds = seconds
        self._write = write
        self._is_needed = is_needed
        self._writing: asyncio.Task[None] | None = None

    def changed(self) -> None:
        """Notes that there is a change."""
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_later())

    async def close(self) -> None:
        """Writes the last changes, if NATS can be used."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        try:
            await self._write()
        except UnavailableError as error:
            log.warning("%s_not_written: %s", self._name, error)

    async def _write_later(self) -> None:
        while self._is_needed():
            await asyncio.sleep(self._seconds)
            with suppress(UnavailableError):
                await self._write()
