"""A scripted service: one job with fixed events, streams that break as scripted. It runs on gRPC's
threads, so that both clients, and commands in other processes, can be tested against it from one
process.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from img2img.v1 import (
    admin_service_pb2_grpc,
    event_pb2,
    job_pb2,
    service_pb2,
    service_pb2_grpc,
)
from tests.fake_admin import FakeAdmin
from tests.fake_job import NAME, State, events, job


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status with the details of the service; without a reason, the status is one of the
    transport.
    """

    code: grpc.StatusCode
    message: str = ""
    reason: str = ""
    details: tuple[Message, ...] = ()

    def abort(self, context: grpc.ServicerContext[Any, Any]) -> NoReturn:
        """Ends the call with this status."""
        if not self.reason:
            context.abort(self.code, self.message)
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain="img2img.v1", metadata={"made": "up"}
        )
        packed = []
        for detail in (info, *self.details):
            packed.append(AnyMessage())
            packed[-1].Pack(detail)
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)
        context.abort_with_status(rpc_status.to_status(status))


# value of a Break: the stream stays open without messages
SILENCE = Refusal(grpc.StatusCode.CANCELLED)
STOPPING = Refusal(grpc.StatusCode.UNAVAILABLE, "This server is stopping.", "UNAVAILABLE")
INVALID = Refusal(
    grpc.StatusCode.INVALID_ARGUMENT,
    "bad",
    "INVALID_REQUEST",
    (
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=field, description=text, reason=reason
                )
                for field, text, reason in (
                    ("strength", "too high", "OUT_OF_RANGE"),
                    ("width", "not a multiple", "NOT_DIVISIBLE"),
                )
            ]
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class Break:
    """Ends a stream after `after` messages, with OK if there is no refusal. With SILENCE the stream
    stays open without further messages until the caller closes it.
    """

    after: int
    refusal: Refusal | None = STOPPING
    heartbeats: int = 0  # heartbeats that are sent before, one every 0.1 s


def started() -> threading.Event:
    """Returns an event that is set."""
    event = threading.Event()
    event.set()
    return event


@dataclass
class FakeService(service_pb2_grpc.Img2ImgServiceServicer):
    """Responds as scripted and records every request."""

    log: list[event_pb2.JobEvent] = field(default_factory=events)
    pages: dict[str, service_pb2.ListJobsResponse] = field(default_factory=dict)
    # one response for each stream, in this order
    breaks: deque[Break] = field(default_factory=deque)
    # one response for each other call, in this order
    refusals: deque[Refusal] = field(default_factory=deque)
    # Streams begin when this event is set.
    slow_start: threading.Event = field(default_factory=started)
    pause_after: int | None = None  # The events of the log. After them, the job does not change.
    requests: list[Message] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    device: str = "cpu"
    request_ids: set[str] = field(default_factory=set)  # requests; each one creates a job
    paused: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    warning: str = ""  # the ids of the job
    # set when a caller has closed its stream
    left: threading.Event = field(default_factory=threading.Event)

    def Generate(  # noqa: N802
        self, request: service_pb2.GenerateRequest, context: grpc.ServicerContext[Any, Any]
    ) -> Iterator[service_pb2.GenerateResponse]:
        self._keep(request, context)
        self.request_ids.add(request.request_id)
        for event in self._stream(0, context):
            yield service_pb2.GenerateResponse(event=event)

    def WatchJob(  # noqa: N802
        self, request: service_pb2.WatchJobRequest, context: grpc.ServicerContext[Any, Any]
    ) -> Iterator[service_pb2.WatchJobResponse]:
        self._keep(request, context)
        for event in self._stream(request.after_sequence, context):
            yield service_pb2.WatchJobResponse(event=event)

    def CreateJob(  # noqa: N802
        self, request: service_pb2.CreateJobRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.CreateJobResponse:
        self.note(request, context)
        self.request_ids.add(request.request_id)
        return service_pb2.CreateJobResponse(job=self._job())

    def GetJob(  # noqa: N802
        self, request: service_pb2.GetJobRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.GetJobResponse:
        self.note(request, context)
        return service_pb2.GetJobResponse(job=self._job())

    def ListJobs(  # noqa: N802
        self, request: service_pb2.ListJobsRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.ListJobsResponse:
        self.note(request, context)
        return self.pages[request.page_token]

    def CancelJob(  # noqa: N802
        self, request: service_pb2.CancelJobRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.CancelJobResponse:
        self.note(request, context)
        self.cancelled.set()
        return service_pb2.CancelJobResponse(job=self._job())

    def RedeliverWebhook(  # noqa: N802
        self, request: service_pb2.RedeliverWebhookRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.RedeliverWebhookResponse:
        self.note(request, context)
        return service_pb2.RedeliverWebhookResponse(job=self._job())

    def UpdateStorageSettings(  # noqa: N802
        self,
        request: service_pb2.UpdateStorageSettingsRequest,
        context: grpc.ServicerContext[Any, Any],
    ) -> service_pb2.UpdateStorageSettingsResponse:
        self.note(request, context)
        stored = service_pb2.StorageSettings()
        stored.CopyFrom(request.settings)
        for secret in ("aws_access_key_id", "aws_secret_access_key"):
            stored.ClearField(secret)
        return service_pb2.UpdateStorageSettingsResponse(settings=stored, warning="mind the gap")

    def ResetStorageSettings(  # noqa: N802
        self,
        request: service_pb2.ResetStorageSettingsRequest,
        context: grpc.ServicerContext[Any, Any],
    ) -> service_pb2.ResetStorageSettingsResponse:
        self.note(request, context)
        return service_pb2.ResetStorageSettingsResponse(deploy_type="realtime")

    def GetCapabilities(  # noqa: N802
        self, request: service_pb2.GetCapabilitiesRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.GetCapabilitiesResponse:
        self.note(request, context)
        model = service_pb2.Model(
            name="atelier",
            family="sd",
            schedulers=["ddim", "euler"],
            loras=["ink"],
            default_num_inference_steps=20,
            default_guidance_scale=3.5,
            default_strength=0.7,
            workers=1,
            device=self.device,
            native_size=512,
            max_num_inference_steps=50,
            min_side_pixels=256,
            max_side_pixels=1024,
            side_multiple=16,
            kind=service_pb2.Model.KIND_DIFFUSION,
            guidance=service_pb2.Model.GUIDANCE_CLASSIFIER_FREE,
            strength_rule=service_pb2.Model.STRENGTH_RULE_FLOOR,
            takes_negative_prompt=True,
            takes_prompt_weights=True,
            max_clip_skip=12,
            embeddings=["<worn>"],
            state=service_pb2.Model.STATE_LOADED,
            load_failures=["w2: a part is missing"],
            refused_loras={"wool": "it belongs to another model"},
            scheduler_max_steps={"lcm": 40},
        )
        limits = service_pb2.Limits(
            max_prompt_characters=2000,
            min_side_pixels=256,
            max_side_pixels=1024,
            side_multiple=8,
            max_samples=4,
            max_num_inference_steps=100,
            max_guidance_scale=30,
            max_image_bytes=20_971_520,
            max_image_pixels=64_000_000,
            max_message_bytes=34 * 2**20,
            max_queued_jobs=15,
            init_image_media_types=["image/png", "image/jpeg", "image/webp"],
            retention=Duration(seconds=86_400),
            max_negative_prompt_characters=2000,
            max_lora_scale=2,
            max_clip_skip=32,
            max_preview_interval_steps=100,
            max_annotations=16,
            max_annotation_name_characters=63,
            max_annotation_characters=2000,
            max_track_id_characters=191,
            max_url_characters=4096,
            max_seed=2**63 - 1,
            max_strength=1,
            max_loras=8,
            min_lora_scale=-2,
        )
        return service_pb2.GetCapabilitiesResponse(
            server_version="0.1.0", models=[model], limits=limits
        )

    def EstimateJob(  # noqa: N802
        self, request: service_pb2.EstimateJobRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.EstimateJobResponse:
        self.note(request, context)
        spec = job_pb2.JobSpec(model="atelier", width=624, height=416, samples=1)
        spec.MergeFrom(request.spec)
        return service_pb2.EstimateJobResponse(
            spec=spec,
            device_seconds=2.5,
            position=1,
            wait=Duration(seconds=3),
            eta=Duration(seconds=6),
            price=0.0042,
            currency="EUR",
            denoising_steps=12,
        )

    def GetCaller(  # noqa: N802
        self, request: service_pb2.GetCallerRequest, context: grpc.ServicerContext[Any, Any]
    ) -> service_pb2.GetCallerResponse:
        self.note(request, context)
        return service_pb2.GetCallerResponse(tenant="shop", key_id="0a1b", permissions=["manage"])

    def _stream(
        self, after_sequence: int, context: grpc.ServicerContext[Any, Any]
    ) -> Iterator[event_pb2.JobEvent]:
        self.left.clear()
        self.slow_start.wait()
        context.add_callback(self.left.set)
        scripted = self.breaks.popleft() if self.breaks else None
        snapshot = event_pb2.JobSnapshot(job=self._job())
        head = event_pb2.JobEvent(sequence=after_sequence, job=NAME, snapshot=snapshot)
        tail = (event for event in self._follow() if event.sequence > after_sequence)
        for count, event in enumerate(itertools.chain([head], tail)):
            if scripted and count == scripted.after:
                break
            yield event
        for _ in range(scripted.heartbeats if scripted else 0):
            self.left.wait(0.1)
            yield event_pb2.JobEvent(sequence=after_sequence, heartbeat=event_pb2.Heartbeat())
        if scripted and scripted.refusal is SILENCE:
            self.left.wait()
        elif scripted and scripted.refusal:
            scripted.refusal.abort(context)

    def _follow(self) -> Iterator[event_pb2.JobEvent]:
        yield from self.log[: self.pause_after]
        if self.pause_after is not None:
            self.paused.set()
            self.left.wait()  # The call waits until the caller leaves or the server stops.

    def _job(self) -> job_pb2.Job:
        ended = self.log[-1]
        made = job(State.STATE_CANCELLED if self.cancelled.is_set() else State.STATE_QUEUED)
        made.warning = self.warning
        made.spec.CopyFrom(getattr(ended, str(ended.WhichOneof("event"))).job.spec)
        return made

    def _keep(self, request: Message, context: grpc.ServicerContext[Any, Any]) -> None:
        self.requests.append(request)
        given = dict(context.invocation_metadata())
        self.keys.append(str(given.get("authorization", "")))

    def note(self, request: Message, context: grpc.ServicerContext[Any, Any]) -> None:
        """Records the request and raises the next refusal, if there is one."""
        self._keep(request, context)
        if self.refusals:
            self.refusals.popleft().abort(context)


@contextmanager
def serving(
    service: FakeService,
    port: int = 0,
    credentials: grpc.ServerCredentials | None = None,
    host: str = "127.0.0.1",
) -> Iterator[int]:
    """Yields a service on a loopback port. At the end all calls end at once."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    service_pb2_grpc.add_Img2ImgServiceServicer_to_server(service, server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(FakeAdmin(service.note), server)
    address = f"{host}:{port}"
    if credentials:
        bound = server.add_secure_port(address, credentials)
    else:
        bound = server.add_insecure_port(address)
    server.start()
    try:
        yield bound
    finally:
        server.stop(grace=0).wait()


def last(requests: Sequence[Message], kind: type[Message]) -> Any:
    """Returns the last request of a type."""
    return [request for request in requests if isinstance(request, kind)][-1]
