"""Receives the requests of calls within budgets of bytes.

gRPC reads the request of a unary call before it calls the handler. So every call has a handler for
a stream of requests, which reads the one request when there is room for it. Until then HTTP/2's
flow control holds the request back, and at most 64 KiB of it are in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Final, NoReturn, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc_status import rpc_status

from img2img_server import errors
from img2img_server.api.convert_service import status_of
from img2img_server.budget import Budget, Share

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
RECEIVE_SECONDS: Final = 60.0  # seconds in which a request with a valid key must arrive
WAIT_SECONDS: Final = 10.0  # seconds that a call waits for room for its request
# Decodes a message. Raises DecodeError. None: the bytes are the message.
Parse: TypeAlias = Callable[[bytes], Any] | None


class HeldRequest:
    """The bytes of a request that count against the budget until `release` is called.

    The call releases them when it ends, unless `keep` was called: work that continues after the end
    of the call may hold the request.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._is_kept = False

    def keep(self) -> None:
        """Leaves the release to the caller of this method."""
        self._is_kept = True

    def release(self) -> None:
        """Stops counting the request. A second call has no effect."""
        self._share.release()

    def end_call(self) -> None:
        """Releases the request unless it is kept."""
        if not self._is_kept:
            self.release()


_held: ContextVar[HeldRequest] = ContextVar("held_request")


@contextmanager
def request_kept() -> Iterator[None]:
    """Counts the request of the current call during the body, also when the call ends before."""
    held = _held.get()
    held.keep()
    try:
        yield
    finally:
        held.release()


class Receiver:
    """Reads one request of a call.

    Args:
        budget: The bytes of the requests. The size of a request is known only after it was read, so
            `most_bytes`, the largest message that gRPC accepts, are taken before.
        limit: The largest request; None: what gRPC accepts.
        seconds: The time in which the request must arrive.
    """

    def __init__(
        self, budget: Budget, most_bytes: int, *, limit: int | None = None, seconds: float
    ) -> None:
        self._budget = budget
        self._most_bytes = most_bytes
        self._limit = most_bytes if limit is None else limit
        self._seconds = seconds

    async def receive(self, context: Context, owner: str, parse: Parse) -> tuple[Any, HeldRequest]:
        """Returns the decoded request and its bytes in the budget.

        Raises:
            ServerBusyError: There is no room for the request.
            MalformedRequestError: The request cannot be decoded, or the call has none.
        """
        message, held = await self.next(context, owner, parse)
        if message is None:
            held.release()
            raise errors.MalformedRequestError
        _held.set(held)
        return message, held

    async def next(
        self, context: Context, owner: str, parse: Parse
    ) -> tuple[Any | None, HeldRequest]:
        """Returns the next request of a stream, None if there is none, and its bytes."""
        share = await self._budget.take(owner, self._most_bytes)
        try:
            with _ended_after(context, self._seconds):
                data = await context.read()
            if data is grpc.aio.EOF:
                return None, HeldRequest(share)
            if len(data) > self._limit:
                del data
                raise errors.RequestTooLargeError(self._limit)
            share.resize(len(data))
            return parse(data) if parse else data, HeldRequest(share)
        except DecodeError:
            share.release()
            raise errors.MalformedRequestError from None
        except BaseException:
            share.release()
            raise

    async def stream(self, context: Context, owner: str, parse: Parse) -> AsyncIterator[Any]:
        """Yields the requests of a call with several ones, until the caller sends no more."""
        while True:
            message, held = await self.next(context, owner, parse)
            held.release()
            if message is None:
                return
            yield message


async def abort(context: Context, status: status_pb2.Status) -> NoReturn:
    """Ends the RPC with the status."""
    call_status = rpc_status.to_status(status)
    context.set_trailing_metadata(call_status.trailing_metadata)
    await context.abort(call_status.code, call_status.details)
    raise AssertionError  # context.abort always raises.


@contextmanager
def _ended_after(context: Context, seconds: float) -> Iterator[None]:
    """Ends the call with an error if the body takes longer.

    The read itself is not cancelled: gRPC would still fill memory that Python has freed.
    """
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []

    async def end() -> None:
        error = errors.UnavailableError(f"the request did not arrive within {seconds:g} s")
        with suppress(grpc.aio.AbortError):
            await abort(context, status_of(error))

    timer = loop.call_later(seconds, lambda: ending.append(loop.create_task(end())))
    try:
        yield
    finally:
        timer.cancel()
