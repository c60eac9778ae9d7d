"""Authenticates every RPC, limits open calls, maps errors to statuses, measures and logs."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

import grpc
import structlog
from google.rpc import status_pb2
from opentelemetry.trace import SpanKind

from img2img_server import errors
from img2img_server.api.convert_service import status_of
from img2img_server.api.encoded import serializer
from img2img_server.api.keys import KeyRing, Principal
from img2img_server.api.public import PublicServices
from img2img_server.api.receive import RECEIVE_SECONDS, WAIT_SECONDS, Parse, Receiver, abort
from img2img_server.api.stream_tokens import StreamTokens
from img2img_server.budget import Budget
from img2img_server.nats.key_uses import KeyUses
from img2img_server.settings import STREAM_PREFIX, Settings
from img2img_server.telemetry import RPC_SECONDS, RPCS, count_refusal
from img2img_server.tracing import end, enter, extracted

PACKAGE = "/img2img.v1."  # prefix of the names of the api's services
# The calls that need memory or hold a stream. The HTTP contract promises not to limit fetch.
_COUNTED = frozenset({"Generate", "CreateJob", "WatchJob", "CreateUpload", "CompleteUpload"})
# Open calls with one response, of all tenants. A tenant has no more than it leaves free.
UNARY_CALLS: Final = 1000
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_principal: ContextVar[Principal] = ContextVar("principal")

TOKEN_STREAMS: Final = 16  # event streams of one job that its tokens may open

log = structlog.get_logger()


def current_principal() -> Principal:
    """Returns the principal of the current call's key."""
    return _principal.get()


class OpenCalls:
    """Limits the open calls of each tenant, or of each job of a token, at this api to `most`."""

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

        Raises TooManyCallsError.
        """
        held = ExitStack()
        held.enter_context(self.counted(method, tenant))
        rpc.add_done_callback(lambda _: held.close())
        return held


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates calls, maps errors, and bounds open calls and the bytes of requests. Health and
    reflection need no key, see public.py.
    """

    def __init__(
        self, keys: KeyRing, uses: KeyUses, tokens: StreamTokens, settings: Settings
    ) -> None:
        self._keys = keys
        self._uses = uses
        self._tokens = tokens
        self._calls = OpenCalls(settings.max_tenant_calls)
        self._token_calls = OpenCalls(TOKEN_STREAMS)
        self._unary = Budget("unary calls", UNARY_CALLS, leaves_free=True)
        request_bytes = Budget(
            "request bytes",
            max(settings.max_request_bytes, 2 * settings.max_message_bytes),
            leaves_free=True,
            wait_seconds=WAIT_SECONDS,
        )
        self._receiver = Receiver(
            request_bytes, settings.max_message_bytes, seconds=RECEIVE_SECONDS
        )
        self._public = PublicServices(settings.max_message_bytes)

    async def intercept_service(  # type: ignore[override]  # the stub is generic by method
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(details)
        if handler is None:
            return handler
        key = bearer_key(details.invocation_metadata)
        principal = self._keys.authenticate(key)
        has_expired = principal is not None and principal.has_expired
        if not details.method.startswith(PACKAGE):
            tenant = principal.tenant if principal and not has_expired else ""
            return self._public.bounded(details.method, handler, tenant)
        rpc = _Rpc(details, principal, self._receiver)
        if principal is None:
            try:
                principal = self._tokens.authenticate(key, rpc.method)
            except errors.StreamTokenExpiredError as refused:
                return rpc.refusing(refused)
            if principal is None:
                return rpc.refusing(_unknown(key))
            rpc = _Rpc(details, principal, self._receiver)
        if has_expired:
            return rpc.refusing(errors.ApiKeyExpiredError())
        self._uses.note(principal.key_id)
        try:
            # grpc runs the whole call in this task, so the call counts while its request is
            # received.
            task = asyncio.current_task()
            assert task is not None
            if principal.only_job is None:
                rpc.held = self._calls.count(rpc.method, principal.tenant, task)
            else:  # The holder of a token must not use up the tenant's calls.
                owner = f"{principal.tenant}/{principal.only_job}"
                rpc.held = self._token_calls.count(rpc.method, owner, task)
            if not handler.response_streaming:
                rpc.held.enter_context(self._unary.try_take(principal.tenant, 1))
        except (errors.TooManyCallsError, errors.ServerBusyError) as refused:
            rpc.held.close()
            return rpc.refusing(refused)
        # Both are declared with streams of requests, see receive.py.
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                rpc.streaming(handler.unary_stream, handler.request_deserializer),
                response_serializer=serializer(handler.response_serializer or bytes),
            )
        return grpc.stream_unary_rpc_method_handler(
            rpc.unary(handler.unary_unary, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


class _Rpc:
    """One RPC, without its request. Times it and records how it ended, in metrics and one log line.

    The line has the tenant, the id of the key and the reason of an error, so that an operator finds
    which caller gets errors and why; without a valid key, the peer. It never has the key or a part
    of the request.

    grpc keeps the exception of an abort in a cycle with the call's context until the next garbage
    collection. So the frames of that exception do not hold the request, which can have megabytes.
    """

    def __init__(
        self, details: grpc.HandlerCallDetails, principal: Principal | None, receiver: Receiver
    ) -> None:
        self.method = details.method.rpartition("/")[2]
        # The stack is closed at the end of the call, which then no longer counts.
        self.held = ExitStack()
        self._path = details.method.removeprefix("/")
        self._trace = extracted(details.invocation_metadata or ())
        self._principal = principal
        self._receiver = receiver
        self._code = "OK"
        self._facts: dict[str, str] = {}
        if principal:
            self._facts = {"tenant": principal.tenant, "key_id": principal.key_id}

    def refusing(self, error: errors.ServiceError) -> Handler:
        """Returns a handler that ends the call with the error without reading the request."""

        async def call(_: Any, context: Context) -> None:
            if not self._principal:
                self._facts["peer"] = context.peer()
            with self._measured():
                await abort(context, self._failed(error))

        # The handler is declared as streaming, since grpc would read a single request before
        # calling it.
        return grpc.stream_stream_rpc_method_handler(call)

    def unary(self, inner: Any, parse: Parse) -> Callable[..., Awaitable[Any]]:
        """Returns the handler of a call with one response."""

        async def call(_: Any, context: Context) -> Any:
            with self._measured():
                try:
                    with self.held:
                        return await inner(await self._receive(context, parse), context)
                except (grpc.aio.AbortError, asyncio.CancelledError):
                    raise
                except Exception as error:
                    status = self._failed(error)
                return await abort(context, status)

        return call

    def streaming(self, inner: Any, parse: Parse) -> Callable[..., AsyncIterator[Any]]:
        """Returns the handler of a call with a stream of responses."""

        async def call(_: Any, context: Context) -> AsyncIterator[Any]:
            with self._measured():
                try:
                    with self.held:
                        async for message in inner(await self._receive(context, parse), context):
                            yield message
                    return
                except (grpc.aio.AbortError, asyncio.CancelledError):
                    raise
                except Exception as error:
                    status = self._failed(error)
                await abort(context, status)

        return call

    async def _receive(self, context: Context, parse: Parse) -> Any:
        """Returns the request, whose bytes count until the call ends."""
        assert self._principal
        request, held = await self._receiver.receive(context, self._principal.tenant, parse)
        self.held.callback(held.end_call)
        return request

    def _failed(self, error: Exception) -> status_pb2.Status:
        """Returns the status of an error. An unexpected error becomes INTERNAL with an id that the
        log has.
        """
        if not isinstance(error, errors.ServiceError):
            facts = {"method": self.method, "error_id": secrets.token_hex(8)}
            log.error("unhandled_error_in_rpc", **facts, exc_info=error)
            error = errors.InternalError(facts["error_id"])
        self._code = error.code.name
        self._facts["reason"] = error.reason
        count_refusal(self._facts.get("tenant", ""), error.reason)
        return status_of(error)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        if self._principal:
            _principal.set(self._principal)
        start = time.monotonic()
        attributes = {"rpc.system": "grpc", "rpc.method": self.method}
        span = enter(self._path, self._trace, SpanKind.SERVER, attributes)
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self._code = "CANCELLED"
            raise
        finally:
            code, seconds = self._code, time.monotonic() - start
            RPCS.labels(self.method, code).inc()
            RPC_SECONDS.labels(self.method).observe(seconds)
            log.info("rpc", method=self.method, code=code, seconds=round(seconds, 4), **self._facts)
            end(span, "" if code in ("OK", "CANCELLED") else code)


def _unknown(key: str) -> errors.ServiceError:
    """Returns the error of a text that is neither a key nor a token of the call."""
    if not key:
        return errors.ApiKeyMissingError()
    if key.startswith(STREAM_PREFIX):
        return errors.StreamTokenInvalidError()
    return errors.UnauthenticatedError()


def bearer_key(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Returns the key of "authorization: Bearer KEY"; empty if there is none."""
    for name, value in metadata or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
    return ""
