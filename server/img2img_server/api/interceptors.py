"""What every RPC passes through: the key, errors made into statuses, metrics and a log line."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from opentelemetry.trace import SpanKind

from img2img_server import errors
from img2img_server.api.calls import OpenCalls
from img2img_server.api.convert import duration
from img2img_server.api.keys import KeyRing, Principal
from img2img_server.domain.violations import Violation
from img2img_server.telemetry import RPC_SECONDS, RPCS
from img2img_server.tracing import end, enter, extracted

PACKAGE = "/img2img.v1."  # of our services
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_principal: ContextVar[Principal] = ContextVar("principal")

log = structlog.get_logger()


def current_principal() -> Principal:
    """Who calls; set for every method of our services."""
    return _principal.get()


def status_of(error: errors.ServiceError) -> status_pb2.Status:
    """The status with its details: ErrorInfo always, BadRequest or RetryInfo where they apply."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason, domain=errors.DOMAIN, metadata=error.metadata
        )
    ]
    if isinstance(error, errors.InvalidRequestError):
        fields = [_field_violation(violation) for violation in error.violations]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_seconds is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_seconds)))
    status = status_pb2.Status(code=error.code.value, message=str(error))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _field_violation(violation: Violation) -> error_details_pb2.BadRequest.FieldViolation:
    return error_details_pb2.BadRequest.FieldViolation(
        field=violation.field, description=violation.text, reason=violation.reason
    )


async def abort(context: Context, status: status_pb2.Status) -> NoReturn:
    """Ends the RPC with the status."""
    call_status = rpc_status.to_status(status)
    context.set_trailing_metadata(call_status.trailing_metadata)
    await context.abort(call_status.code, call_status.details)
    raise AssertionError  # abort raises


class _Rpc:
    """What a call is known by, without its request."""

    def __init__(self, method: str, details: grpc.HandlerCallDetails) -> None:
        self.method = method
        self.path = details.method.removeprefix("/")
        self.trace = extracted(details.invocation_metadata or ())
        self.principal: Principal | None = None


class ServiceInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates, maps errors, counts. Other services (health, reflection) pass untouched."""

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
            # grpc runs the whole call in this task: a request that is still on its way counts.
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


# grpc keeps the exception of an abort in a cycle with the call's context. What its frames hold
# lives until the collector comes by: the request, of megabytes, must be gone before.


def _refusing(rpc: _Rpc, error: errors.ServiceError) -> Handler:
    async def call(_: Any, context: Context) -> None:
        with _Measured(rpc, context.peer()) as measured:
            await abort(context, measured.failed(error))

    # As a stream of requests, of which none is read: who is refused makes us hold no megabytes.
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
    """The key of "authorization: Bearer KEY"; empty when there is none."""
    for name, value in metadata or ():
        if name == "authorization" and isinstance(value, str):
            scheme, _, key = value.partition(" ")
            if scheme.lower() == "bearer":
                return key.strip()
    return ""


class _Measured:
    """Times one RPC and says how it ended, in metrics and in one line of the log.

    The line names the tenant, the id of its key and the reason of a refusal, so that an operator
    finds who is refused and why. A call without a known key has its peer instead. Neither a key nor
    anything of the request is in it.
    """

    def __init__(self, rpc: _Rpc, peer: str = "") -> None:
        self._rpc = rpc
        self._method = rpc.method
        self._code = "OK"
        self._facts: dict[str, str] = {"peer": peer}
        if rpc.principal:
            self._facts = {"tenant": rpc.principal.tenant, "key_id": rpc.principal.key_id}

    def failed(self, error: Exception) -> status_pb2.Status:
        """The status to answer with; the unexpected becomes INTERNAL with a logged id."""
        if not isinstance(error, errors.ServiceError):
            error_id = secrets.token_hex(8)
            log.error("rpc broke", method=self._method, error_id=error_id, exc_info=error)
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
