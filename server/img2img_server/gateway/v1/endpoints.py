"""The routes under /v1: methods of the gRPC service over HTTP. They offer more than ModelsLab's
contract: previews, a model, a scheduler, cancelling.

    GET  /v1/capabilities       GetCapabilities
    POST /v1/jobs               CreateJob
    POST /v1/jobs:estimate      EstimateJob
    GET  /v1/jobs               ListJobs
    GET  /v1/jobs/{id}          GetJob
    POST /v1/jobs/{id}:cancel   CancelJob
    POST /v1/jobs/{id}:token    CreateStreamToken
    GET  /v1/jobs/{id}/events   WatchJob, as server-sent events

Bodies are the methods' own messages as JSON, see protojson.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from img2img.v1 import event_pb2, service_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.requests import Img2ImgRequest, merge
from img2img_server.domain.job import TERMINAL_STATES
from img2img_server.domain.violations import Reason, Violation
from img2img_server.gateway.http import event_stream, request_ids
from img2img_server.gateway.http.callers import header_key
from img2img_server.gateway.http.event_stream import PING, paced
from img2img_server.gateway.http.http_request import find_key, link_base
from img2img_server.gateway.openapi import BODY, WITH_TOKEN, outcomes
from img2img_server.gateway.upstream import ENDED, Creation, Upstream
from img2img_server.gateway.v1 import job_lists, job_requests, protojson, unknown_fields
from img2img_server.gateway.v1.errors import ErrorFormat, V1Error
from img2img_server.gateway.v1.schemas import ESTIMATE_BODY, JOB_BODY, JOB_QUERY
from img2img_server.settings import STREAM_PREFIX, Settings

_MAX_SEQUENCE = 2**53 - 1  # the largest integer that every JSON parser reads exactly
_KEY_IN_QUERY = (
    "token must be one that POST /v1/jobs/{id}:token made; a key is never read from the query"
)
_EVENT = {
    "type": "object",
    "properties": {key: {"type": "string"} for key in ("event", "id", "data")},
    "required": ["event", "id", "data"],
}
# The type is str, so that a wrong key is reported before a wrong number.
_SEQUENCE: dict[str, Any] = {"json_schema_extra": {"pattern": "^[0-9]{0,15}$"}}
AfterSequence = Annotated[
    str, Query(description="Skips the events up to this sequence number.", **_SEQUENCE)
]
LastEventId = Annotated[
    str,
    Header(
        alias="Last-Event-ID",
        description="The header that browsers send when they reconnect; like after_sequence.",
        **_SEQUENCE,
    ),
]
JobId = Annotated[str, Path(description="The `id` of the job.")]


class _JobIdConvertor(StringConvertor):
    """Matches no colon, so that GET /v1/jobs/{id}:cancel is a wrong method and not a job."""

    regex = "[^/:]+"


register_url_convertor("job_id", _JobIdConvertor())


_outcomes = partial(outcomes, form=ErrorFormat(), schema=V1Error.__name__)


class Endpoints:
    """Answers these calls. Event streams end when `stop` is set; clients resume them."""

    def __init__(self, settings: Settings, upstream: Upstream, stop: asyncio.Event) -> None:
        self._settings = settings
        self._upstream = upstream
        self._stop = stop

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["jobs"])
        found = _outcomes("GetCapabilitiesResponse")
        router.get("/capabilities", responses=found)(self.get_capabilities)
        creating = (ErrorKind.FORBIDDEN, ErrorKind.REQUEST_ID_REUSED, ErrorKind.RATE_LIMIT)
        found = _outcomes("CreateJobResponse", errors=[*BODY, ErrorKind.FIELDS, *creating])
        parameters = [*request_ids.PARAMETERS["parameters"], JOB_QUERY]
        extra = {**JOB_BODY, "parameters": parameters}
        router.post("/jobs", responses=found, openapi_extra=extra)(self.create_job)
        failing = [*BODY, ErrorKind.FIELDS, ErrorKind.FORBIDDEN]
        found = _outcomes("EstimateJobResponse", errors=failing)
        extra = {**ESTIMATE_BODY, "parameters": [JOB_QUERY]}
        router.post("/jobs:estimate", responses=found, openapi_extra=extra)(self.estimate_job)
        found = _outcomes("ListJobsResponse", errors=[ErrorKind.FIELDS])
        router.get("/jobs", responses=found, openapi_extra=job_lists.PARAMETERS)(self.list_jobs)
        found = _outcomes("GetJobResponse", errors=[ErrorKind.UNKNOWN_JOB])
        router.get("/jobs/{job_id:job_id}", responses=found)(self.get_job)
        failing = [*BODY, ErrorKind.UNKNOWN_JOB, ErrorKind.JOB_ENDED]
        found = _outcomes("CancelJobResponse", errors=failing)
        router.post("/jobs/{job_id}:cancel", responses=found)(self.cancel_job)
        failing = [*BODY, ErrorKind.UNKNOWN_JOB]
        found = _outcomes("CreateStreamTokenResponse", errors=failing)
        router.post("/jobs/{job_id}:token", responses=found)(self.create_stream_token)
        failing = [ErrorKind.FIELDS, ErrorKind.UNKNOWN_JOB, ErrorKind.RATE_LIMIT]
        found = _outcomes(errors=failing)
        found[200] = {"content": {"text/event-stream": {"schema": _EVENT}}}
        found[204] = {"description": "No event comes after Last-Event-ID."}
        add = router.get(
            "/jobs/{job_id}/events",
            responses=found,
            response_class=Response,
            openapi_extra={"security": WITH_TOKEN},
        )
        add(self.watch_job)
        return router

    async def get_capabilities(self, request: Request) -> Response:
        """Returns the models being served, the default one first, and the limits, as
        GetCapabilities does over gRPC."""
        key = find_key(request, {})
        await self._refuse_unknown(request, key)
        return protojson.response(await self._upstream.capabilities(key))

    async def create_job(self, request: Request) -> Response:
        """Queues a job and responds at once, as CreateJob does over gRPC. The body is JSON, a form
        whose fields are those of the spec, or the init image itself with the fields in the query.
        """
        sent = await job_requests.read(request)
        key = find_key(request, {"key": sent.key})
        create = sent.create
        create.request_id, wrong = request_ids.find(request, create.request_id)
        if violations := sent.violations + wrong:
            create.Clear()
            await self._upstream.caller(key)  # A wrong key is reported before wrong fields.
            raise RequestError(ErrorKind.FIELDS, violations=merge(Img2ImgRequest, violations))
        base = link_base(request, self._settings.public_base_url)
        try:
            creation = Creation(key, create.spec, base, create.request_id)
            job = await self._upstream.create(creation)
        except RequestError as error:
            error.violations = merge(Img2ImgRequest, error.violations)
            raise
        return protojson.response(service_pb2.CreateJobResponse(job=job))

    async def estimate_job(self, request: Request) -> Response:
        """Estimates a job without creating it, as EstimateJob does over gRPC. The request is like
        one of POST /v1/jobs, and the init image may be left out."""
        sent = await job_requests.read(request)
        key = find_key(request, {"key": sent.key})
        if "request_id" in sent.given:  # An estimate creates nothing.
            sent.violations.append(protojson.unknown("request_id"))
        if sent.violations:
            await self._upstream.caller(key)  # A wrong key is reported before wrong fields.
            raise RequestError(ErrorKind.FIELDS, violations=merge(Img2ImgRequest, sent.violations))
        return protojson.response(await self._upstream.estimate(key, sent.create.spec))

    async def list_jobs(self, request: Request) -> Response:
        """Returns a page of your jobs, newest first, as ListJobs does over gRPC. With `request_id`,
        only the job that was created with it: so a caller that got no response finds its job. The
        key must be in a header."""
        key = find_key(request, {})
        wanted, violations = job_lists.read(request)
        if violations:
            await self._upstream.caller(key)  # A wrong key is reported before wrong parameters.
            raise RequestError(ErrorKind.FIELDS, violations=violations)
        return protojson.response(await self._upstream.list_jobs(key, wanted))

    async def get_job(self, request: Request, job_id: JobId) -> Response:
        """Returns a job with its state, its images and its timings, as GetJob does over gRPC. The
        key must be in a header."""
        key = find_key(request, {})
        await self._refuse_unknown(request, key)
        job = await self._upstream.get(key, job_id)
        return protojson.response(service_pb2.GetJobResponse(job=job))

    async def cancel_job(self, request: Request, job_id: JobId) -> Response:
        """Ends a queued job at once and a running one at its next step, as CancelJob does over
        gRPC."""
        key = await unknown_fields.key_of_body(request, self._upstream.caller)
        return protojson.response(
            service_pb2.CancelJobResponse(job=await self._upstream.cancel(key, job_id))
        )

    async def create_stream_token(self, request: Request, job_id: JobId) -> Response:
        """Returns a token for /v1/jobs/{id}/events, as CreateStreamToken does over gRPC. Give it
        to a page in a browser as `?token=`: an EventSource sends no headers."""
        key = await unknown_fields.key_of_body(request, self._upstream.caller)
        return protojson.response(await self._upstream.stream_token(key, job_id))

    async def watch_job(
        self,
        request: Request,
        job_id: JobId,
        after_sequence: AfterSequence = "",
        last_event_id: LastEventId = "",
    ) -> Response:
        """Streams server-sent events until the job has ended: `data` is a JobEvent of img2img.v1 as
        ProtoJSON with the proto's field names, `event` its kind, `id` its sequence. The key must be
        in a header, or a token of the job in the query. Status 204 keeps an EventSource from
        reconnecting after the last event."""
        token = "" if header_key(request.headers) else request.query_params.get("token", "")
        if token and not token.startswith(STREAM_PREFIX):  # A key in a query would get into logs.
            raise RequestError(ErrorKind.BAD_KEY, _KEY_IN_QUERY)
        key = find_key(request, {"key": token})
        # A token can call no other method, so it is not checked before the parameters.
        if not token:
            known = ("token", "after_sequence")
            await self._refuse_unknown(request, key, known)
        text = last_event_id or after_sequence or "0"
        after = int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else -1
        if not 0 <= after <= _MAX_SEQUENCE:
            if not token:  # A token can call no other method.
                await self._upstream.caller(key)
            message = "after_sequence must be an integer of at least 0"
            wrong = Violation("after_sequence", Reason.OUT_OF_RANGE, message)
            raise RequestError(ErrorKind.FIELDS, violations=[wrong])
        if last_event_id and after and await self._is_last(key, job_id, after):
            return Response(status_code=204)
        events = self._upstream.watch(key, job_id, after)
        first = await anext(events)  # Errors are reported before the stream begins.
        return EventSourceResponse(self._frames(first, events), headers=event_stream.HEADERS)

    async def _refuse_unknown(
        self, request: Request, key: str, known: Collection[str] = ()
    ) -> None:
        """Raises RequestError if the query has parameters that are not known."""
        await unknown_fields.refuse(request, partial(self._upstream.caller, key), known=known)

    async def _is_last(self, key: str, job_id: str, sequence: int) -> bool:
        """Returns whether the job's terminal event has this sequence."""
        async with aclosing(self._upstream.watch(key, job_id, sequence - 1)) as events:
            snapshot = await anext(events)
            if snapshot.snapshot.job.state not in ENDED:
                return False
            async for event in events:
                is_terminal = event.WhichOneof("event") in TERMINAL_STATES
                return is_terminal and event.sequence <= sequence
        return True

    async def _frames(
        self, first: event_pb2.JobEvent, events: AsyncGenerator[event_pb2.JobEvent, None]
    ) -> AsyncIterator[bytes]:
        yield _frame(first)
        async with aclosing(paced(events, self._stop)) as following:
            with suppress(RequestError):  # The api stops.
                async for event in following:
                    yield PING if event is None else _frame(event)


def _frame(event: event_pb2.JobEvent) -> bytes:
    data = protojson.dump(event)
    return format_sse_event(data_str=data, event=event.WhichOneof("event"), id=str(event.sequence))
