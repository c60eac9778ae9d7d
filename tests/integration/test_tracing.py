"""One trace from the caller's context to the steps on the device: a real gateway process and a real
collector; api and worker in this process."""

import base64
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import grpc
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span as WireSpan
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from benchmarks.local_stack import free_port
from img2img.v1 import service_pb2
from img2img_server.settings import Settings
from img2img_server.storage.s3_blobs import connect_blobs
from tests.http_stack import served_gateway
from tests.processes import Role
from tests.stack import DEV, photo, running_stack, settings, spec

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, PARENT = int(CALLER.split("-")[1], 16), int(CALLER.split("-")[2], 16)


@pytest.fixture(scope="module")
def recorder() -> Iterator[InMemorySpanExporter]:
    """Records the spans of api and worker. A process can set a tracer provider only once."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(recorder: InMemorySpanExporter) -> InMemorySpanExporter:
    recorder.clear()
    return recorder


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Collects the spans that arrive over OTLP, by service."""

    def __init__(self) -> None:
        self.spans: dict[str, list[WireSpan]] = {}
        self.address = ""

    async def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, _: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            names = {item.key: item.value.string_value for item in resource.resource.attributes}
            kept = self.spans.setdefault(names["service.name"], [])
            for scope in resource.scope_spans:
                kept.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    found, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)
    found.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield found
    await server.stop(None)


def by_name(spans: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in spans.get_finished_spans()}


async def test_every_stage_of_a_job_hangs_in_the_trace_of_its_caller(
    spans: InMemorySpanExporter,
) -> None:
    async with running_stack() as stack:
        request = service_pb2.GenerateRequest(
            spec=spec(num_inference_steps=10, strength=0.5, safety_checker=True, samples=2)
        )
        call = stack.api.stub.Generate(request, metadata=(*DEV, ("traceparent", CALLER)))
        messages = [message async for message in call]
    assert messages[-1].event.WhichOneof("event") == "succeeded"
    found = by_name(spans)
    rpc, run = found["img2img.v1.Img2ImgService/Generate"], found["run job"]
    assert rpc.parent is not None
    assert (rpc.context.trace_id, rpc.parent.span_id) == (TRACE, PARENT)
    assert run.parent is not None
    assert (run.context.trace_id, run.parent.span_id) == (TRACE, rpc.context.span_id)
    stages = {"prepare", "encode", "denoise", "decode", "safety", "image encode", "upload"}
    assert stages <= found.keys()
    for name in stages:
        parent = found[name].parent
        assert parent is not None
        assert parent.span_id == run.context.span_id, name
        assert run.start_time <= found[name].start_time <= found[name].end_time <= run.end_time
    denoised = [span for span in spans.get_finished_spans() if span.name == "denoise"]
    assert sorted(span.attributes["img2img.sample"] for span in denoised) == [0, 1]
    for span in denoised:
        assert [event.attributes["step"] for event in span.events] == [1, 2, 3, 4, 5]


async def test_an_error_marks_its_span_and_a_call_without_a_context_begins_a_trace(
    spans: InMemorySpanExporter,
) -> None:
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError):
            await stack.api.create(spec(strength=1.5))
    rpc = by_name(spans)["img2img.v1.Img2ImgService/CreateJob"]
    assert rpc.parent is None
    assert rpc.status.status_code is trace.StatusCode.ERROR
    assert rpc.attributes["error.type"] == "INVALID_ARGUMENT"


async def test_a_gateway_exports_its_span_and_passes_the_context_on_past_any_proxy(
    spans: InMemorySpanExporter,
    collector: Collector,
    engine_settings: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    http_port, config = free_port(), engine_settings()
    async with connect_blobs(config) as blobs:
        await blobs.prepare()
    async with running_stack() as stack:
        gateway = Role(
            "gateway",
            {
                "IMG2IMG_HTTP_PORT": str(http_port),
                "IMG2IMG_API_ADDRESS": stack.api.address,
                "IMG2IMG_DEV_KEY": "true",
                "IMG2IMG_S3_ENDPOINT_URL": config.s3_endpoint_url,
                "IMG2IMG_S3_BUCKET": config.s3_bucket,
                "IMG2IMG_S3_ACCESS_KEY": config.s3_access_key.get_secret_value(),
                "IMG2IMG_S3_SECRET_KEY": config.s3_secret_key.get_secret_value(),
                "IMG2IMG_OTLP_ENDPOINT": collector.address,
                # No process listens on this proxy port, so the test proves that no proxy is used.
                **dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:1"),
            },
            tmp_path / "gateway.log",
        )
        await gateway.start()
        try:
            body = {
                "key": "dev-key",
                "prompt": "a harbour",
                "init_image": base64.b64encode(photo()).decode(),
                "width": "256",
                "height": "256",
            }
            url = f"http://127.0.0.1:{http_port}/api/v6/realtime/img2img"
            headers = {"traceparent": CALLER}
            async with (
                aiohttp.ClientSession() as session,
                session.post(url, json=body, headers=headers) as answer,
            ):
                assert (await answer.json())["status"] == "success"
        finally:
            await gateway.stop()  # Waiting spans are sent at the end.
    sent = {span.name: span for span in collector.spans["img2img-gateway"]}
    request = sent["POST /api/v6/realtime/img2img"]
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == tuple(CALLER.split("-")[1:3])
    rpcs = [span for span in spans.get_finished_spans() if span.name.endswith("/CreateJob")]
    assert [span.parent and span.parent.span_id for span in rpcs] == [
        int(request.span_id.hex(), 16)
    ]
    assert settings().otlp_endpoint == "", "nothing is sent anywhere unless it is asked for"


async def test_an_http_request_is_one_span_and_a_probe_none(
    spans: InMemorySpanExporter,
) -> None:
    """With OpenTelemetry installed, FastAPI would create its own spans in another trace."""
    async with served_gateway() as gateway:
        for path, headers in (
            ("/v1/capabilities", {"Authorization": "Bearer dev-key"}),
            ("/v1/capabilities", {"Authorization": "Bearer dev-key", "traceparent": CALLER}),
            ("/nowhere", {}),
        ):
            spans.clear()
            await gateway.http.get(path, headers=headers)
            found = [each for each in spans.get_finished_spans() if each.name.startswith("GET")]
            assert len(found) == 1, path
            assert len({each.context.trace_id for each in spans.get_finished_spans()}) == 1
        spans.clear()
        for probe in ("/readyz", "/healthz", "/readyz/"):
            await gateway.http.get(probe)
        assert spans.get_finished_spans() == ()
