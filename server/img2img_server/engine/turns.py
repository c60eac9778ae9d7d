"""Lets the engines of one device run their steps one after the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class DeviceTurns:
    """Turns on one device, which are given in the order in which they were requested.

    So the intermediate results of only one step are in memory at a time, and each engine measures
    its own.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._requested = 0
        self._finished = 0
        self._loading = 0
        self._loads = 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits until the turns that were requested before have ended."""
        with self._changed:
            ticket, self._requested = self._requested, self._requested + 1
            self._changed.wait_for(lambda: self._finished == ticket)
        try:
            yield
        finally:
            with self._changed:
                self._finished += 1
                self._changed.notify_all()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Notes that weights are loaded in the body, without a turn."""
        self._note_load(1)
        try:
            yield
        finally:
            self._note_load(-1)

    def _note_load(self, change: int) -> None:
        with self._changed:
            self._loading += change
            self._loads += 1

    @property
    def loads(self) -> tuple[int, int]:
        """The number of loads that run now, and a number that changes with each load. Memory that
        is measured while they change holds the weights of another model, too.
        """
        with self._changed:
            return self._loading, self._loads
