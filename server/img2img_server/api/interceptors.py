"""Authenticates every RPC, limits open calls, turns errors into statuses, measures and logs."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from img2img_server import errors
from img2img_server.api.convert_service import status_of
from img2img_server.api.keys import KeyRing, Principal
from img2img_server.telemetry import RPC_SECONDS, RPCS
from img2img_server.tracing import end, enter, extracted

PACKAGE = "/img2img.v1."  # of the api's services
# The calls that need memory or hold a stream. The HTTP contract promises not to limit fetch.
_COUNTED = frozenset({"Generate", "CreateJob", "WatchJob"})
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_principal: ContextVar[Principal] = ContextVar("principal")

log = structlog.get_logger()


def current_principal() -> Principal:
    """Returns the principal of the key that makes the call."""
    return _principal.get()


async def abort(context: Context, status: status_pb2.Status) -> NoReturn:
    """Ends the RPC with the status."""
    call_status = rpc_status.to_status(status)
    context.set_trailing_metadata(call_status.trailing_metadata)
    await context.abort(call_status.code, call_status.details)
    raise AssertionError  # abort raises


class OpenCalls:
    """Limits the open calls of each tenant at this api to `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def counted(self, method: str, tenant: str) -> Iterator[None]:
        """Counts a call during the body. Raises TooManyCallsError."""
        if method not in _COUNTED:
            yield
            return
        if self._open[tenant] >= self._most:
            raise errors.TooManyCallsError(self._most)
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]

    def count(self, method: str, tenant: str, rpc: asyncio.Task[Any]) -> ExitStack:
        """Counts a call until the stack is closed, or its task has ended.

        Raises:
            TooManyCallsError.
        """
        held = ExitStack()
        held.enter_context(self.counted(method, tenant))
        rpc.add_done_callback(lambda _: held.close())
        return held


class _Rpc:
    """A call without its request."""

    def __init__(self, method: str, details: grpc.HandlerCallDetails) -> None:
        self.method = method
        self.path = details.method.removeprefix("/")
        self.trace = extracted(details.invocation_metadata or ())
        self.principal: Principal | None = None


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates, maps errors, counts. Does not touch other services: health, reflection."""

    def __init__(self, keys: KeyRing, calls: OpenCalls) -> None:
        self._keys = keys
        self._calls = calls

    async def intercept_service(  # type: ignore[override]  # the stub is generic by method
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(details)
        if not details.method.startswith(PACKAGE) or handler is None:
            return handler
        method = details.method.rpartition("/")[2]
        rpc = _Rpc(method, details)
        principal = self._keys.authenticate(bearer_key(details.invocation_metadata))
        if principal is None:
            return _refusing(rpc, errors.UnauthenticatedError())
        rpc.principal = principal
        try:
            # grpc runs the whole call in this task, so a request that is being received counts.
            task = asyncio.current_task()
            assert task is not None
            held = self._calls.count(method, principal.tenant, task)
        except errors.TooManyCallsError as refused:
            return _refusing(rpc, refused)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _streaming(rpc, principal, held, handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary(rpc, principal, held, handler.unary_unary),
            handler.request_deserializer,
            handler.response_serializer,
        )


# grpc keeps the exception of an abort in a cycle with the call's context until the next garbage
# collection. The frames of that exception must not hold the request, which can have megabytes.


def _refusing(rpc: _Rpc, error: errors.ServiceError) -> Handler:
    async def call(_: Any, context: Context) -> None:
        with _Measured(rpc, context.peer()) as measured:
            await abort(context, measured.failed(error))

    # As a stream of requests, of which none is read, so that the request takes no memory.
    return grpc.stream_stream_rpc_method_handler(call)


def _unary(
    rpc: _Rpc, principal: Principal, held: ExitStack, inner: Any
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        _principal.set(principal)
        with _Measured(rpc) as measured:
            try:
                with held:
                    return await inner(request, context)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                status = measured.failed(error)
            del request
            return await abort(context, status)

    return call


def _streaming(
    rpc: _Rpc, principal: Principal, held: ExitStack, inner: Any
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        _principal.set(principal)
        with _Measured(rpc) as measured:
            try:
                with held:
                    async for message in inner(request, context):
                        yield message
                return
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                status = measured.failed(error)
            del request
            await abort(context, status)

    return call


def bearer_key(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the key of "authorization: Bearer KEY"; empty if there is none."""
    for name, value in metadata or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
    return ""


class _Measured:
    """Times one RPC and records how it ended, in metrics and in one log line.

    The line has the tenant, the id of the key and the reason of an error, so that an operator finds
    which caller gets errors and why; without a valid key, the peer. It never has the key or a part
    of the request.
    """

    def __init__(self, rpc: _Rpc, peer: str = "") -> None:
        self._rpc = rpc
        self._method = rpc.method
        self._code = "OK"
        self._facts: dict[str, str] = {"peer": peer}
        if rpc.principal:
            self._facts = {"tenant": rpc.principal.tenant, "key_id": rpc.principal.key_id}

    def failed(self, error: Exception) -> status_pb2.Status:
        """Returns the status of an error; an unexpected error becomes INTERNAL with a logged id."""
        if not isinstance(error, errors.ServiceError):
            error_id = secrets.token_hex(8)
            log.error(
                "unhandled_error_in_rpc", method=self._method, error_id=error_id, exc_info=error
            )
            error = errors.InternalError(error_id)
        self._code = error.code.name
        self._facts["reason"] = error.reason
        return status_of(error)

    def __enter__(self) -> _Measured:
        self._start = time.monotonic()
        attributes = {"rpc.system": "grpc", "rpc.method": self._method}
        self._span = enter(self._rpc.path, self._rpc.trace, SpanKind.SERVER, attributes)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError | GeneratorExit):
            self._code = "CANCELLED"
        seconds = time.monotonic() - self._start
        RPCS.labels(self._method, self._code).inc()
        RPC_SECONDS.labels(self._method).observe(seconds)
        facts = {name: fact for name, fact in self._facts.items() if fact}
        log.info("rpc", method=self._method, code=self._code, seconds=round(seconds, 4), **facts)
        end(self._span, "" if self._code in ("OK", "CANCELLED") else self._code)
