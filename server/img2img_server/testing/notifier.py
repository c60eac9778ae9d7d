"""Wakes tasks and keeps handlers, for implementations in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Notifier:
    """Wakes all waiting tasks after a change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    def wait_handle(self) -> asyncio.Event:
        """Returns the event that the next change sets. Take it before reading the state that may
        change.
        """
        return self._event


@contextmanager
def listed(handlers: list[T], handler: T) -> Iterator[None]:
    """Keeps a handler in the list while the context is open."""
    handlers.append(handler)
    try:
        yield
    finally:
        handlers.remove(handler)
