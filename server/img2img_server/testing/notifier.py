"""Waiting for a change inside one process."""

from __future__ import annotations

import asyncio


class Notifier:
    """Wakes everybody who waits when something changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def wait_handle(self) -> asyncio.Event:
        """To be taken before looking at what may change, and waited for after."""
        return self._event
