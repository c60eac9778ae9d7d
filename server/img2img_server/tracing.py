"""Traces by OpenTelemetry, from the caller through api and queue to the steps on the device.

Without an endpoint, spans cost almost nothing, but the caller's context is still forwarded. Queued
messages and call metadata contain it as W3C trace context.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from img2img_server import __version__
from img2img_server.settings import Settings

TRACER: Final = trace.get_tracer("img2img_server", __version__)
_FIELDS: Final = TraceContextTextMapPropagator()
_LAST_SPANS_SECONDS: Final = 1.0


@contextmanager
def exporting(settings: Settings, role: str) -> Iterator[None]:
    """Sends the spans of the body to the collector in the settings, the last ones at its end.

    The OTEL_ variables of the SDK apply, for example to sampling.
    """
    if not settings.otlp_endpoint:
        yield
        return
    # Imported here, since the SDK takes 25 MB.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    plain = not settings.otlp_endpoint.startswith("https://")
    exporter = OTLPSpanExporter(
        endpoint=settings.otlp_endpoint,
        insecure=plain,
        timeout=5,
        # The SDK declares a text, but gRPC accepts only numbers for numeric options.
        channel_options=(("grpc.enable_http_proxy", int(settings.use_proxy_environment)),),  # type: ignore[arg-type]
    )
    resource = Resource.create({"service.name": f"img2img-{role}", "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # A collector that does not respond must not delay the end of the process.
        sending = threading.Thread(target=provider.shutdown, daemon=True)
        sending.start()
        sending.join(_LAST_SPANS_SECONDS)


def extracted(fields: Iterable[tuple[str, str | bytes]]) -> Context:
    """Returns the caller's context from metadata, headers or a message; empty if there is none."""
    known = {
        name: value for name, value in fields if name in _FIELDS.fields and isinstance(value, str)
    }
    return _FIELDS.extract(known, context=Context())


def injected() -> dict[str, str]:
    """Returns the current context as fields of a message."""
    carrier: dict[str, str] = {}
    _FIELDS.inject(carrier)
    return carrier


def enter(
    name: str, parent: Context, kind: SpanKind, attributes: Mapping[str, Any] | None = None
) -> Span:
    """Starts a span and makes it the current span of this task and the tasks that it starts.

    Use it for whole tasks only: nothing resets the current span.
    """
    span = TRACER.start_span(name, parent, kind, attributes)
    context.attach(trace.set_span_in_context(span, parent))
    return span


def end(span: Span, error: str = "") -> None:
    """Ends a span, with the name of an error if there was one."""
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))
    span.end()


def trace_id() -> str:
    """Returns the id of the current trace in hexadecimal, for logs; empty outside of a span."""
    found = trace.get_current_span().get_span_context()
    return trace.format_trace_id(found.trace_id) if found.is_valid else ""
