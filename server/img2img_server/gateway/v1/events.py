"""A job's events as server-sent events, for browsers and other HTTP callers.

`data` is the JobEvent of event.proto as JSON, see protojson.py; `event` is its kind, for example
`step`; `id` its sequence, which EventSource sends back as Last-Event-ID to resume.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import Request
from starlette.responses import Response

from img2img.v1 import event_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.domain.violations import Reason, Violation
from img2img_server.gateway.http.http_request import find_key
from img2img_server.gateway.openapi import outcomes
from img2img_server.gateway.upstream import ENDED, Upstream
from img2img_server.gateway.v1 import protojson
from img2img_server.gateway.v1.calls import JobId

PING_SECONDS = 15.0
_PING = b": ping\n\n"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_SEQUENCE_MOST = 2**53 - 1  # the largest integer that every JSON reader keeps
_TERMINAL = ("succeeded", "failed", "cancelled")
_JSON = {"contentMediaType": "application/json"}
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string", "description": "The name of the field in JobEvent's oneof."},
        "id": {"type": "string", "pattern": "^[0-9]+$", "description": "The sequence."},
        "data": {"type": "string", "description": "A JobEvent.", **_JSON},
    },
    "required": ["event", "id", "data"],
}
# Strings, which FastAPI accepts all: a wrong key is reported before a wrong number.
_SEQUENCE: dict[str, Any] = {"json_schema_extra": {"pattern": "^[0-9]{0,15}$"}}
AfterSequence = Annotated[
    str, Query(description="Leave out events up to this number.", **_SEQUENCE)
]
LastEventId = Annotated[
    str, Header(alias="Last-Event-ID", description="The same, as browsers send it.", **_SEQUENCE)
]


class EventStreams:
    """Answers GET /v1/jobs/{id}/events. Streams end when `stop` is set; callers resume."""

    def __init__(self, upstream: Upstream, stop: asyncio.Event) -> None:
        self._upstream = upstream
        self._stop = stop

    def router(self) -> APIRouter:
        """Returns the route."""
        router = APIRouter(tags=["events"])
        failing = (ErrorKind.FIELDS, ErrorKind.UNKNOWN_JOB, ErrorKind.RATE_LIMIT)
        found = outcomes(errors=failing)
        found[200] = {"content": {"text/event-stream": {"schema": _EVENT}}}
        found[204] = {"description": "No event comes after Last-Event-ID."}
        path = "/v1/jobs/{job_id}/events"
        router.get(path, responses=found, response_class=Response)(self.serve)
        return router

    async def serve(
        self,
        request: Request,
        job_id: JobId,
        after_sequence: AfterSequence = "",
        last_event_id: LastEventId = "",
    ) -> Response:
        """Server-sent events until the job has ended: `data` is a JobEvent of img2img.v1 as
        ProtoJSON with the proto's field names, `event` its kind, `id` its sequence. The key must be
        in a header. Status 204 keeps an EventSource from reconnecting after the last event."""
        key = find_key(request, {})
        after = _sequence(last_event_id or after_sequence or "0")
        if after is None:
            await self._upstream.caller(key)
            message = "after_sequence must be an integer of at least 0"
            wrong = Violation("after_sequence", Reason.OUT_OF_RANGE, message)
            raise RequestError(ErrorKind.FIELDS, violations=[wrong])
        if not (job_id.isascii() and job_id.isdigit() and len(job_id) <= 12):
            await self._upstream.caller(key)
            raise RequestError(ErrorKind.UNKNOWN_JOB)
        if last_event_id and after and await self._has_seen_the_end(key, int(job_id), after):
            return Response(status_code=204)
        events = self._upstream.watch(key, int(job_id), after)
        first = await anext(events)  # what is wrong is told before the stream begins
        return EventSourceResponse(self._frames(first, events), headers=_HEADERS)

    async def _has_seen_the_end(self, key: str, job_id: int, after: int) -> bool:
        """Whether event number `after` was the terminal one."""
        async with aclosing(self._upstream.watch(key, job_id, after - 1)) as events:
            snapshot = await anext(events)
            if snapshot.snapshot.job.state not in ENDED:
                return False
            async for event in events:
                return event.WhichOneof("event") in _TERMINAL and event.sequence <= after
        return True

    async def _frames(
        self, first: event_pb2.JobEvent, events: AsyncGenerator[event_pb2.JobEvent, None]
    ) -> AsyncIterator[bytes]:
        yield frame(first)
        stopping = asyncio.ensure_future(self._stop.wait())
        following = asyncio.ensure_future(anext(events))
        try:
            while not stopping.done():
                await asyncio.wait(
                    {following, stopping},
                    timeout=PING_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if following.done():
                    yield frame(following.result())
                    following = asyncio.ensure_future(anext(events))
                elif not stopping.done():
                    yield _PING
        except (StopAsyncIteration, RequestError):  # ended, or the api goes: callers resume
            return
        finally:
            following.cancel()
            stopping.cancel()
            await asyncio.gather(following, stopping, return_exceptions=True)
            await events.aclose()


def frame(event: event_pb2.JobEvent) -> bytes:
    """One event as it goes over the wire."""
    data = protojson.dump(event)
    return format_sse_event(data_str=data, event=event.WhichOneof("event"), id=str(event.sequence))


def _sequence(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        return None
    number = int(text)
    return number if number <= _SEQUENCE_MOST else None
