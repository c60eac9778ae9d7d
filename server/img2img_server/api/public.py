"""Bounds the calls that need no key: health and reflection."""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeAlias

import grpc
from google.rpc import status_pb2

from img2img_server import errors
from img2img_server.api.convert_service import status_of
from img2img_server.api.receive import Context, Receiver, abort
from img2img_server.budget import Budget
from img2img_server.peers import grpc_peer_of
from img2img_server.telemetry import RPCS

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
# The requests are names of services and symbols.
MAX_BYTES: Final = 4096
CALLS: Final = 200  # open calls of all peers, streams of health included
_AT_ONCE: Final = 4  # requests that are read at the same time
RECEIVE_SECONDS: Final = 2.0
PENALTY_SECONDS: Final = 10.0  # of a peer, after a request that is too large
_MOST_PENALTIES: Final = 10_000
_WAIT_SECONDS: Final = 2.0


class Penalties:
    """The peers whose requests are refused unread for a while.

    No client sends a name of megabytes by mistake, and to receive it takes much more time than to
    send it.
    """

    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def check(self, owner: str) -> None:
        """Raises ServerBusyError while the penalty of the owner lasts."""
        left = self._until.get(owner, 0.0) - time.monotonic()
        if left > 0:
            raise errors.ServerBusyError("calls of this address", retry_seconds=round(left, 1))

    def add(self, owner: str) -> None:
        """Begins the penalty of the owner."""
        self._until[owner] = time.monotonic() + PENALTY_SECONDS
        self._until.move_to_end(owner)
        if len(self._until) > _MOST_PENALTIES:
            self._until.popitem(last=False)


class PublicServices:
    """Serves calls of health and reflection within budgets for each peer, or for the tenant of a
    valid key.

    A peer holds no more than it leaves free, so others always find room.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._calls = Budget("public calls", CALLS, leaves_free=True)
        self._penalties = Penalties()
        request_bytes = Budget(
            "public request bytes",
            _AT_ONCE * max_message_bytes,
            leaves_free=True,
            wait_seconds=_WAIT_SECONDS,
        )
        self._receiver = Receiver(
            request_bytes, max_message_bytes, limit=MAX_BYTES, seconds=RECEIVE_SECONDS
        )

    def bounded(self, path: str, handler: Handler, tenant: str) -> Handler:
        """Returns the handler with limits. `tenant`: that of the caller's key, or ""."""
        method = path.rpartition("/")[2]
        call = _PublicCall(method, handler, tenant, self._calls, self._penalties, self._receiver)
        if handler.response_streaming:
            inner = handler.stream_stream or handler.unary_stream
            is_generator = inspect.isasyncgenfunction(inner)
            return grpc.stream_stream_rpc_method_handler(
                call.generating(inner) if is_generator else call.awaiting(inner),
                response_serializer=handler.response_serializer,
            )
        return grpc.stream_unary_rpc_method_handler(
            call.awaiting(handler.unary_unary), response_serializer=handler.response_serializer
        )


class _PublicCall:
    """One call of health or reflection."""

    def __init__(
        self,
        method: str,
        handler: Handler,
        tenant: str,
        calls: Budget,
        penalties: Penalties,
        receiver: Receiver,
    ) -> None:
        self._method = method
        self._handler = handler
        self._tenant = tenant
        self._calls = calls
        self._penalties = penalties
        self._receiver = receiver

    def awaiting(self, inner: Any) -> Callable[[Any, Context], Awaitable[Any]]:
        """Returns the handler for a method that is a coroutine function."""

        async def call(_: Any, context: Context) -> Any:
            owner = self._owner(context)
            try:
                self._penalties.check(owner)
                with self._calls.try_take(owner, 1):
                    return await inner(await self._request(context, owner), context)
            except errors.ServiceError as error:
                status = self._failed(owner, error)
            return await abort(context, status)

        return call

    def generating(self, inner: Any) -> Callable[[Any, Context], AsyncIterator[Any]]:
        """Returns the handler for a method that is an asynchronous generator function."""

        async def call(_: Any, context: Context) -> AsyncIterator[Any]:
            owner = self._owner(context)
            try:
                self._penalties.check(owner)
                with self._calls.try_take(owner, 1):
                    async for response in inner(await self._request(context, owner), context):
                        yield response
                return
            except errors.ServiceError as error:
                status = self._failed(owner, error)
            await abort(context, status)

        return call

    def _owner(self, context: Context) -> str:
        return f"tenant {self._tenant}" if self._tenant else grpc_peer_of(context.peer())

    async def _request(self, context: Context, owner: str) -> Any:
        """Returns the request, or the iterator over the requests."""
        parse = self._handler.request_deserializer
        if self._handler.request_streaming:
            return self._receiver.stream(context, owner, parse)
        request, held = await self._receiver.receive(context, owner, parse)
        held.release()  # The limit makes it small.
        return request

    def _failed(self, owner: str, error: errors.ServiceError) -> status_pb2.Status:
        """Counts the error, which may be a penalty. Returns its status.

        grpc keeps the frames of an abort for a while, and the error's frames hold the request. So
        the error itself is not kept.
        """
        if isinstance(error, errors.RequestTooLargeError):
            self._penalties.add(owner)
        RPCS.labels(self._method, error.code.name).inc()
        return status_of(error)
