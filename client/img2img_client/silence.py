"""Notices streams of blocking calls on which nothing arrives any more.

A connection can die without a word: a proxy forgets it, a cable is pulled. The service sends
heartbeats, so a stream that is silent for several of them is broken. gRPC's blocking calls wait
without a time limit, so a thread watches them and cancels the silent ones.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from img2img_client.errors import TRANSPORT, UnavailableError


def silent(seconds: float) -> UnavailableError:
    """Returns the error of a stream on which nothing arrived for so long."""
    text = f"nothing arrived from the service for {seconds:g} seconds"
    return UnavailableError(text, code="UNAVAILABLE", reason=TRANSPORT)


class _Watched:
    """A call, and when it has been silent for too long; infinity while nobody waits for it."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.due = math.inf
        self.is_silent = False


class SilenceWatch:
    """Reads blocking streams, and cancels those that are silent for `seconds`; infinity: never.

    One thread for all streams of a client; it runs while a stream is open.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._watched: set[_Watched] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def messages(self, call: Any) -> Iterator[Any]:
        """Yields the call's messages. The time between two of them is the caller's own.

        Raises:
            UnavailableError: nothing arrived for too long; the call is cancelled.
            grpc.RpcError: the call's own error.
        """
        if math.isinf(self._seconds):
            yield from call
            return
        watched = _Watched(call)
        self._add(watched)
        try:
            while True:
                watched.due = time.monotonic() + self._seconds
                try:
                    message = next(call)
                except StopIteration:
                    return
                except grpc.RpcError as error:
                    if watched.is_silent:
                        raise silent(self._seconds) from error
                    raise
                watched.due = math.inf
                yield message
        finally:
            self._remove(watched)

    def _add(self, watched: _Watched) -> None:
        with self._changed:
            self._watched.add(watched)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="img2img-silence", daemon=True
                )
                self._thread.start()

    def _remove(self, watched: _Watched) -> None:
        with self._changed:
            self._watched.discard(watched)
            if not self._watched:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._watched:
                    self._thread = None
                    return
                now = time.monotonic()
                late = [watched for watched in self._watched if watched.due <= now]
                if not late:
                    # A stream that begins to wait meanwhile is due later than this wakes up.
                    nearest = min(watched.due for watched in self._watched)
                    self._changed.wait(min(nearest - now, self._seconds))
            for watched in late:
                watched.due, watched.is_silent = math.inf, True
                watched.call.cancel()
