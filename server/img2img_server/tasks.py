"""Work that runs beside other work and never outlives it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def background_task(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Starts work that the body may await; when the body ends first, the work is cancelled.

    Unlike a task group, an error of the work reaches only a body that awaits it, as it is.
    """
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextmanager
def reraise_cancellation() -> Iterator[None]:
    """Raises the CancelledError that the body kept to itself.

    `asyncio.wait_for` of Python 3.11 drops a cancellation that comes together with its result, and
    a loop that was told to end once goes on for ever.
    """
    task = asyncio.current_task()
    known = task.cancelling() if task else 0
    yield
    if task and task.cancelling() > known:
        raise asyncio.CancelledError
