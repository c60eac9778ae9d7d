"""The events of one job, each exactly once, even when the connection breaks in between.

`Follow` makes every decision. The classes here do the I/O, blocking and on asyncio.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, Self
from weakref import ref

import grpc
import grpc.aio

from img2img_client import errors
from img2img_client.channel import Endpoint
from img2img_client.diagnosis import explain, explain_async
from img2img_client.events import Event
from img2img_client.resources import Job, Result
from img2img_client.resume import FirstRequest, Follow
from img2img_client.usage import Process

log = logging.getLogger("img2img_client")

# seconds; longest wait for the job's name, without which the job cannot be cancelled
NAME_SECONDS = 2.0
SIGNAL_SECONDS = 0.1  # seconds; greatest delay before Ctrl-C is handled

# A function that starts a call with a request and a timeout in seconds.
Open = Callable[[FirstRequest, float | None], Any]


def is_task_cancelled() -> bool:
    """Returns whether the current CancelledError is for the running task, not for its call."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Calls:
    """The calls that read one job's events.

    They hold neither the stream nor the generator of its events. So Python ends the generator, and
    the job is cancelled, as soon as the caller drops the stream.
    """

    def __init__(self, follow: Follow, endpoint: Endpoint, open_call: Open) -> None:
        self.follow = follow
        self._endpoint = endpoint
        self._open_call = open_call
        self._is_lost = False
        self._call: Any = None  # the newest call
        # a weak reference to the generator, once it has started
        self._events: Callable[[], Any] = lambda: None

    def start(self) -> Any:
        """Returns the generator of the events. Call it once."""
        events = self._run()
        self._events = ref(events)
        return events

    def _run(self) -> Any:
        raise NotImplementedError

    def _open(self) -> Any:
        left = max(0.0, self.follow.deadline - time.monotonic())
        self._call = self._open_call(self.follow.next_request(), None if math.isinf(left) else left)
        return self._call

    def _take(self, message: Any) -> Event | None:
        if self._is_lost:
            self._is_lost = False
            log.info("reconnected")
        return self.follow.take(message.event)

    def _delay(self, failure: grpc.RpcError | errors.RpcError) -> float:
        """Returns the seconds to wait before the next call. Raises RpcError if no call should
        follow.
        """
        error = (
            failure
            if isinstance(failure, errors.RpcError)
            else errors.from_call(failure, self._endpoint)
        )
        delay = self.follow.delay_after(error, time.monotonic())
        if not self.follow.finished:
            self._is_lost = True
            log.info("connection lost, retrying: %s", error)
        return delay

    def _silent(self) -> errors.UnavailableError:
        text = f"no message from the service for {self.follow.silence_seconds:g} seconds"
        return errors.unavailable(text)


class BlockingCalls(_Calls):
    """The calls of a JobStream. `cancel` cancels the job with the given name."""

    def __init__(
        self, follow: Follow, endpoint: Endpoint, open_call: Open, cancel: Callable[[str], None]
    ) -> None:
        super().__init__(follow, endpoint, open_call)
        self._cancel = cancel
        self.process = Process()
        self._read = _Read()
        self._leaving = threading.RLock()

    def leave(self) -> None:
        """Ends the events, even while another thread reads them, and cancels the job.

        The client must be marked as closed before, so that the other thread makes no further call.
        """
        events = self._events()
        with suppress(ValueError):  # Another thread reads the events.
            if events is not None:
                events.close()
        if self._call is not None:
            self._call.cancel()
        self._cancel_job()

    def _cancel_job(self) -> None:
        if not self.process.is_this:  # The job belongs to the parent process.
            return
        with self._leaving:  # `close` of the client waits for this thread, which cancels the job.
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
                    delay = follow.delay_after_end(time.monotonic())
                except (grpc.RpcError, errors.UnavailableError) as failure:
                    try:
                        delay = self._delay(failure)
                    except errors.RpcError as last:
                        raise explain(last, self._endpoint) from failure
                except BaseException:
                    self._learn_name()
                    raise
                finally:
                    if self.process.is_this:  # The parent process continues to read the call.
                        call.cancel()
                time.sleep(delay)
        finally:
            self._cancel_job()

    def _messages(self, call: Any) -> Iterator[Any]:
        """Yields the call's messages. Raises UnavailableError when none arrives for too long.

        gRPC's blocking calls wait without a limit, and a read that Ctrl-C interrupts cannot be
        continued. So another thread reads each message on request. Unlike a Future or a
        Condition, a SimpleQueue stays usable when Ctrl-C interrupts the thread that waits.
        """
        self._read = read = _Read()
        threading.Thread(target=read.run, args=(call,), daemon=True).start()
        try:
            while True:
                read.requests.put(True)
                message = self._result(read)
                if isinstance(message, Exception):
                    raise message
                if message is None:
                    return
                yield message
        finally:
            read.requests.put(False)

    def _result(self, read: _Read) -> Any:
        due = time.monotonic() + self.follow.silence_seconds
        while (left := due - time.monotonic()) > 0:
            # A signal that arrives just before the wait is handled only after it, so the wait is
            # short.
            with suppress(Empty):
                return read.results.get(timeout=min(left, SIGNAL_SECONDS))
        raise self._silent()

    def _learn_name(self) -> None:
        """Waits a short time for the name of the job, which must be cancelled."""
        if self.process.is_this and self.follow.is_ours and not self.follow.job_name:
            with suppress(Empty):
                self._read.results.get(timeout=NAME_SECONDS)
            if hasattr(self._read.newest, "event"):
                self._take(self._read.newest)


class _Read:
    """A thread that reads a blocking call, one message for each request."""

    def __init__(self) -> None:
        self.requests: SimpleQueue[bool] = SimpleQueue()  # False ends the thread
        self.results: SimpleQueue[Any] = SimpleQueue()  # messages; an error or None at the end
        self.newest: Any = None  # the newest entry of `results`

    def run(self, call: Any) -> None:
        """Reads a message for each request in `requests`, until a request is False."""
        while self.requests.get():
            try:
                self.newest = next(call, None)
            except Exception as error:  # The waiting thread raises this error.
                self.newest = error
            self.results.put(self.newest)


class AsyncCalls(_Calls):
    """The calls of an AsyncJobStream; methods as in BlockingCalls."""

    def __init__(
        self,
        follow: Follow,
        endpoint: Endpoint,
        open_call: Open,
        cancel: Callable[[str], Awaitable[None]],
    ) -> None:
        super().__init__(follow, endpoint, open_call)
        self._cancel = cancel
        # the newest task that reads a message of the newest call
        self._message: asyncio.Future[Any] | None = None
        self._leaving: asyncio.Future[None] | None = None

    async def leave(self) -> None:
        """Ends the events, even while another task reads them, and cancels the job."""
        # This is also None while the event loop still has to end the generator.
        events = self._events()
        with suppress(RuntimeError):  # Another task reads the events.
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
                    delay = follow.delay_after_end(time.monotonic())
                except (grpc.RpcError, errors.UnavailableError) as failure:
                    try:
                        delay = self._delay(failure)
                    except errors.RpcError as last:
                        raise await explain_async(last, self._endpoint) from failure
                except (asyncio.CancelledError, grpc.aio.UsageError) as closed:
                    if not is_task_cancelled():  # Closing the channel has cancelled the call.
                        raise errors.ClientClosedError from closed
                    raise
                call.cancel()
                await asyncio.sleep(delay)
        finally:
            await self._left()

    async def _messages(self, call: Any) -> AsyncIterator[Any]:
        """Yields the call's messages. Raises UnavailableError when none arrives for too long.

        gRPC cancels a call together with the task that reads it. So another task reads, and leaving
        the stream can still wait for the job's name.
        """
        messages = aiter(call)
        seconds = None if math.isinf(limit := self.follow.silence_seconds) else limit
        while True:
            self._message = asyncio.ensure_future(anext(messages))
            self._message.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait({self._message}, timeout=seconds)
            if not self._message.done():
                raise self._silent()
            try:
                message = await self._message
            except StopAsyncIteration:
                return
            yield message

    async def _left(self) -> None:
        """Waits until the stream is closed, even if the waiting task is cancelled once more."""
        if self.follow.finished:
            return
        if self._leaving is None:
            self._leaving = asyncio.ensure_future(self._leave())
        await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        follow, message = self.follow, self._message
        if follow.is_ours and not follow.job_name and message is not None:
            await asyncio.wait({message}, timeout=NAME_SECONDS)
            if message.done() and not message.cancelled() and message.exception() is None:
                self._take(message.result())
        if self._call is not None:
            self._call.cancel()
        if name := follow.abandon():
            await self._cancel(name)


@contextmanager
def _single_reader(error: type[Exception]) -> Iterator[None]:
    """Raises ClientUsageError if Python refuses to run a generator that another reader runs."""
    try:
        yield
    except error as refusal:
        if str(refusal).endswith(("already executing", "already running")):
            raise errors.ClientUsageError(errors.STREAM_IN_USE) from refusal
        raise


class _Stream:
    """The properties of both streams."""

    def __init__(self, follow: Follow, check: Callable[[], None]) -> None:
        self._follow = follow
        self._check = check  # raises ClientUsageError where the stream cannot be read

    @property
    def job_name(self) -> str:
        """ "jobs/{id}"; empty until the first event has arrived."""
        return self._follow.job_name

    @property
    def sequence(self) -> int:
        """Number of the last event; `watch` can resume after it."""
        return self._follow.sequence

    @property
    def job(self) -> Job | None:
        """The newest record of the job that an event has brought."""
        return self._follow.job


class JobStream(_Stream):
    """An iterator over the events of a job. Use it in a `with` block. `result()` reads the
    remaining events and returns the images. The service's heartbeats are not returned.
    """

    def __init__(
        self, follow: Follow, events: Generator[Event, None, None], check: Callable[[], None]
    ) -> None:
        super().__init__(follow, check)
        self._events = events

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        self._check()
        with _single_reader(ValueError):
            return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the stream. Cancels the job if this stream created it, unless it is detached or
        has ended.

        In a forked process this does nothing.
        """
        with _single_reader(ValueError):
            self._events.close()

    def result(self) -> Result:
        """Waits for the end of the job and returns its images.

        Raises:
            JobFailedError, JobCancelledError: the job ended without images.
            StreamClosedError: the stream was closed before the job ended.
        """
        for _ in self:
            pass
        return self._follow.result()


class AsyncJobStream(_Stream):
    """An asynchronous iterator over the events of a job. Use it in an `async with` block. Methods
    as in JobStream. Cancelling the task that reads it leaves the stream.
    """

    def __init__(
        self, follow: Follow, events: AsyncGenerator[Event, None], check: Callable[[], None]
    ) -> None:
        super().__init__(follow, check)
        self._events = events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        self._check()
        with _single_reader(RuntimeError):
            return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leaves the stream, as JobStream.close."""
        self._check()
        with _single_reader(RuntimeError):
            await self._events.aclose()

    async def result(self) -> Result:
        """Waits for the end of the job and returns its images, as JobStream.result."""
        async for _ in self:
            pass
        return self._follow.result()
