"""Runs a task in the background of a block, which cancels the task at its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def background_task(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Starts a task that the body may await. Cancels the task if the body ends first.

    Unlike with a task group, an error of the task is raised only if the body awaits the task.
    """
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextmanager
def reraise_cancellation() -> Iterator[None]:
    """Raises the CancelledError that the body swallowed.

    `asyncio.wait_for` of Python 3.11 drops a cancellation that comes together with its result, so a
    cancelled loop would never end.
    """
    task = asyncio.current_task()
    known = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > known:
        raise asyncio.CancelledError
