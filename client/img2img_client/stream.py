"""A job's events, each exactly once, also when the connection breaks in between."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import Self

from img2img_client import requests
from img2img_client.events import Event
from img2img_client.resources import Job
from img2img_client.result import Result
from img2img_client.resume import Follow


def deadline(timeout_seconds: float | None) -> float:
    """The moment on the monotonic clock when the timeout has passed; infinity without one.

    Raises:
        InvalidArgumentError: it is no time to wait.
    """
    if timeout_seconds is None:
        return math.inf
    requests.check_seconds("timeout_seconds", timeout_seconds)
    return time.monotonic() + timeout_seconds


class _Stream:
    """What both streams know about their job."""

    def __init__(self, follow: Follow) -> None:
        self._follow = follow

    @property
    def job_name(self) -> str:
        """ "jobs/{id}"; empty until the first event came."""
        return self._follow.job_name

    @property
    def sequence(self) -> int:
        """Number of the last event; `watch` goes on after it."""
        return self._follow.sequence

    @property
    def job(self) -> Job | None:
        """The newest record that came by: of the snapshot, then of the end."""
        return self._follow.job


class JobStream(_Stream):
    """Iterate over it, best inside `with`; `result()` reads what is left and joins the pictures.

    Heartbeats of the service are not handed out.
    """

    def __init__(self, follow: Follow, events: Generator[Event, None, None]) -> None:
        super().__init__(follow)
        self._events = events

    def __iter__(self) -> Iterator[Event]:
        return self._events

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the stream; cancels the job if it is ours, not detached and not ended."""
        self._events.close()

    def result(self) -> Result:
        """Waits for the job's end and returns its pictures.

        Raises:
            JobFailedError, JobCancelledError: the job ended without pictures.
            StreamClosedError: the stream was closed before that.
        """
        for _ in self._events:
            pass
        return self._follow.result()


class AsyncJobStream(_Stream):
    """Iterate over it, best inside `async with`; `result()` reads what is left and joins the
    pictures. Cancelling the task that reads leaves the stream. Heartbeats are not handed out."""

    def __init__(self, follow: Follow, events: AsyncGenerator[Event, None]) -> None:
        super().__init__(follow)
        self._events = events

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """As JobStream.close."""
        await self._events.aclose()

    async def result(self) -> Result:
        """As JobStream.result."""
        async for _ in self._events:
            pass
        return self._follow.result()
