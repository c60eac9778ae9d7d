"""The calls behind a stream: made again when one breaks, and left with their job cancelled.

`Follow` makes every decision; the classes here only do the I/O, blocking and on asyncio.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any
from weakref import ref

import grpc

from img2img_client import errors
from img2img_client.channel import Endpoint
from img2img_client.diagnosis import explain, explain_async
from img2img_client.events import Event
from img2img_client.resume import FirstRequest, Follow
from img2img_client.silence import SilenceWatch, silent

log = logging.getLogger("img2img_client")

CANCEL_SECONDS = 5.0  # how long leaving a stream may take to cancel its job
NAME_SECONDS = 2.0  # how long leaving a stream waits for its job's name before that

# Begins a call: its request and its timeout in seconds.
Open = Callable[[FirstRequest, float | None], Any]


def is_task_cancelled() -> bool:
    """Whether the CancelledError at hand is for the running task, not for a call that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Calls:
    """The calls that read one job, and what leaving them does.

    They hold neither the stream nor the generator of its events: as soon as nobody else holds the
    generator, it ends, and so does the job.
    """

    def __init__(self, follow: Follow, endpoint: Endpoint, open_call: Open) -> None:
        self.follow = follow
        self._endpoint = endpoint
        self._open_call = open_call
        self._is_lost = False
        self._call: Any = None  # the newest

    def _open(self) -> Any:
        left = max(0.0, self.follow.deadline - time.monotonic())
        self._call = self._open_call(self.follow.next_request(), None if math.isinf(left) else left)
        return self._call

    def _take(self, message: Any) -> Event | None:
        if self._is_lost:
            self._is_lost = False
            log.info("connected again")
        return self.follow.take(message.event)

    def _broke(self, broken: grpc.RpcError | errors.UnavailableError) -> float:
        error = (
            broken
            if isinstance(broken, errors.UnavailableError)
            else errors.from_call(broken, self._endpoint)
        )
        pause = self.follow.broke(error, time.monotonic())
        if not self.follow.finished:
            self._is_lost = True
            log.info("connection lost, trying again: %s", error)
        return pause


class BlockingCalls(_Calls):
    """The calls of a JobStream."""

    def __init__(
        self,
        follow: Follow,
        endpoint: Endpoint,
        open_call: Open,
        cancel: Callable[[str], None],
        silence: SilenceWatch,
    ) -> None:
        super().__init__(follow, endpoint, open_call)
        self._cancel = cancel
        self._silence = silence
        self._first: Future[Any] | None = None  # message of the newest call
        self._events: Callable[[], Generator[Event, None, None] | None] = lambda: None
        self._leaving = threading.RLock()

    def begin(self) -> Generator[Event, None, None]:
        """Returns the events. To be called once."""
        events = self._run()
        self._events = ref(events)
        return events

    def leave(self) -> None:
        """Ends the events, also while another thread reads them, and cancels the job.

        For a client that is closed: the other thread must find it so.
        """
        events = self._events()
        with suppress(ValueError):  # another thread reads them
            if events is not None:
                events.close()
        if self._call is not None:
            self._call.cancel()
        self._cancel_job()

    def _cancel_job(self) -> None:
        with self._leaving:  # who closes the connection waits for the thread that cancels
            if name := self.follow.abandon():
                self._cancel(name)

    def _run(self) -> Generator[Event, None, None]:
        follow = self.follow
        try:
            while not follow.finished:
                call = self._open()
                try:
                    for message in self._messages(call):
                        if (event := self._take(message)) is not None:
                            yield event
                    pause = follow.ended(time.monotonic())
                except (grpc.RpcError, errors.UnavailableError) as broken:
                    try:
                        pause = self._broke(broken)
                    except errors.RpcError as last:
                        raise explain(last, self._endpoint) from broken
                except BaseException:
                    self._learn_name()
                    raise
                finally:
                    call.cancel()
                time.sleep(pause)
        finally:
            self._cancel_job()

    def _messages(self, call: Any) -> Iterator[Any]:
        """Yields the call's messages. Raises UnavailableError when it is silent for too long."""
        limit = self.follow.silence_seconds
        # In a thread of its own: a read that Ctrl-C interrupts cannot be taken up again, and who
        # leaves at once still has to learn the job's name.
        first: Future[Any] = Future()
        self._first = first
        reading = threading.Thread(target=_read_one, args=(call, first), daemon=True)
        reading.start()
        try:
            message = first.result(None if math.isinf(limit) else limit)
        except TimeoutError:
            raise silent(limit) from None
        if message is not None:
            yield message
            yield from self._silence.messages(call)

    def _learn_name(self) -> None:
        """Waits a short time for the name of the job that is to be cancelled."""
        if self.follow.is_ours and not self.follow.job_name and self._first is not None:
            with suppress(grpc.RpcError, TimeoutError):
                message = self._first.result(NAME_SECONDS)
                if message is not None:
                    self._take(message)


def _read_one(call: Any, into: Future[Any]) -> None:
    """Reads one message of a blocking call, None at its end."""
    try:
        into.set_result(next(call, None))
    except Exception as error:  # handed to the thread that waits
        into.set_exception(error)


class AsyncCalls(_Calls):
    """The calls of an AsyncJobStream."""

    def __init__(
        self,
        follow: Follow,
        endpoint: Endpoint,
        open_call: Open,
        cancel: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__(follow, endpoint, open_call)
        self._cancel = cancel
        self._first: asyncio.Future[Any] | None = None  # message of the newest call
        self._events: Callable[[], AsyncGenerator[Event, None] | None] = lambda: None
        self._leaving: asyncio.Future[None] | None = None

    def begin(self) -> AsyncGenerator[Event, None]:
        """Does the same as BlockingCalls.begin."""
        events = self._run()
        self._events = ref(events)
        return events

    async def leave(self) -> None:
        """Does the same as BlockingCalls.leave."""
        events = self._events()  # None also while the loop still has to end it
        with suppress(RuntimeError):  # another task reads them
            if events is not None:
                await events.aclose()
        await self._left()

    async def _run(self) -> AsyncGenerator[Event, None]:
        follow = self.follow
        try:
            while not follow.finished:
                call = self._open()
                try:
                    async for message in self._messages(call):
                        if (event := self._take(message)) is not None:
                            yield event
                    pause = follow.ended(time.monotonic())
                except (grpc.RpcError, errors.UnavailableError) as broken:
                    try:
                        pause = self._broke(broken)
                    except errors.RpcError as last:
                        raise await explain_async(last, self._endpoint) from broken
                except asyncio.CancelledError as cancelled:
                    if not is_task_cancelled():  # so the call was, by closing the client
                        raise errors.ClientClosedError from cancelled
                    raise
                call.cancel()
                await asyncio.sleep(pause)
        finally:
            await self._left()

    async def _messages(self, call: Any) -> AsyncIterator[Any]:
        """Yields the call's messages. Raises UnavailableError when it is silent for too long."""
        limit = self.follow.silence_seconds
        seconds = None if math.isinf(limit) else limit
        messages = aiter(call)
        # A task of its own: gRPC cancels a call together with the task that reads it, and a task
        # that leaves at once still has to learn its job's name.
        self._first = first = asyncio.ensure_future(anext(messages))
        first.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({first}, timeout=seconds)
        if not first.done():
            raise silent(limit)
        try:
            yield await first
            while True:
                async with asyncio.timeout(seconds) as waiting:
                    message = await anext(messages)
                yield message
        except StopAsyncIteration:
            return
        except TimeoutError:
            if not waiting.expired():
                raise
            raise silent(limit) from None

    async def _left(self) -> None:
        """Waits until the call is left, whoever began that.

        It goes on when the task that waits is cancelled once more.
        """
        if self.follow.finished:
            return
        if self._leaving is None:
            self._leaving = asyncio.ensure_future(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        follow, first = self.follow, self._first
        if follow.is_ours and not follow.job_name and first is not None:
            await asyncio.wait({first}, timeout=NAME_SECONDS)
            if first.done() and not first.cancelled() and first.exception() is None:
                self._take(first.result())
        if self._call is not None:
            self._call.cancel()
        if name := follow.abandon():
            await self._cancel(name)
