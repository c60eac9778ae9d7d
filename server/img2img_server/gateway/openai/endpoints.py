"""The routes of OpenAI's API: docs/openai-api.md.

GET  /v1/models               GetCapabilities
POST /v1/images/edits         CreateJob and WatchJob, until the job has ended
POST /v1/images/generations   an error, because a job needs an init image
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NoReturn

from fastapi import APIRouter, Path
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.files import read
from img2img_server.compat.modelslab.requests import without_effect
from img2img_server.domain.job import TERMINAL_STATES
from img2img_server.domain.violations import Reason, Violation
from img2img_server.errors import StorageError
from img2img_server.gateway.http import event_stream, request_ids
from img2img_server.gateway.http.event_stream import PING, EventStream, paced
from img2img_server.gateway.http.files import Files
from img2img_server.gateway.http.http_request import find_key, link_base, read_body
from img2img_server.gateway.openai import requests, responses, schemas
from img2img_server.gateway.openai.errors import ErrorFormat, renamed
from img2img_server.gateway.openapi import BODY, content, outcomes
from img2img_server.gateway.upstream import Creation, Upstream
from img2img_server.lifecycle import first_of
from img2img_server.settings import Settings
from img2img_server.tasks import background_task

_NEEDS_IMAGE: Final = (
    "image is required: this service makes images from an init image, send it to /v1/images/edits"
)
_WAIT_SECONDS: Final = 1  # until another gateway can take the request of one that stops
_NO_MODEL: Final[dict[int | str, Any]] = {
    404: {"description": "There is no such model.", "content": content("OpenAIError")}
}
ModelName = Annotated[str, Path(description="The `id` of a model of the list.")]


@dataclass(slots=True)
class _Job:
    """A job that a request waits for.

    Attributes:
        record: The record, which is terminal once the job has ended.
        needs_caller: Whether the job has to be cancelled if the caller leaves. False with an
            Idempotency-Key, with which the caller can repeat the request, and after the end.
        images: The images that were reported, by index.
    """

    key: str
    record: job_pb2.Job
    needs_caller: bool
    is_ended: bool = False
    images: dict[int, job_pb2.Image] = field(default_factory=dict)

    def take(self, event: event_pb2.JobEvent) -> None:
        """Keeps what the event reports."""
        kind = event.WhichOneof("event")
        if kind == "sample_finished":
            self.images[event.sample_finished.sample] = event.sample_finished.image
        elif kind in TERMINAL_STATES:
            self.record = getattr(event, kind).job
            self.is_ended, self.needs_caller = True, False


def _outcomes(*names: str, errors: Iterable[ErrorKind] = ()) -> dict[int | str, Any]:
    return outcomes(*names, errors=errors, form=ErrorFormat(), schema="OpenAIError")


class Endpoints:
    """Answers these calls."""

    def __init__(
        self, settings: Settings, upstream: Upstream, files: Files, stop: asyncio.Event
    ) -> None:
        self._settings = settings
        self._upstream = upstream
        self._files = files
        self._stop = stop
        self._errors = ErrorFormat()
        self._cancelling: set[asyncio.Task[None]] = set()

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        router.get("/models", responses=_outcomes("OpenAIModels"))(self.list_models)
        found = _outcomes("OpenAIModel") | _NO_MODEL
        router.get("/models/{name:path}", responses=found)(self.get_model)
        creating = (ErrorKind.FORBIDDEN, ErrorKind.REQUEST_ID_REUSED, ErrorKind.RATE_LIMIT)
        failing = [*BODY, ErrorKind.FIELDS, *creating]
        found = _outcomes("OpenAIImages", errors=failing) | _NO_MODEL
        found[200]["content"] |= schemas.EVENTS
        found[200]["headers"] = schemas.HEADERS
        extra = schemas.EDIT_BODY | request_ids.PARAMETERS
        router.post("/images/edits", responses=found, openapi_extra=extra)(self.edit)
        # Not in the OpenAPI document, since no request can succeed.
        router.post("/images/generations", include_in_schema=False)(self.generate)
        return router

    async def list_models(self, request: Request) -> JSONResponse:
        """Returns the models being served, the default one first."""
        models = await self._models(request)
        headers = responses.without_effect(request.query_params)
        data = list(map(responses.model, models))
        return JSONResponse({"object": "list", "data": data}, headers=headers)

    async def get_model(self, request: Request, name: ModelName) -> JSONResponse:
        """Returns one model."""
        for each in await self._models(request):
            if each.name == name:
                headers = responses.without_effect(request.query_params)
                return JSONResponse(responses.model(each), headers=headers)
        message = "There is no model of this name: GET /v1/models lists those that are served"
        unknown = Violation("model", Reason.NOT_SUPPORTED, message)
        raise RequestError(ErrorKind.FIELDS, reason="MODEL_NOT_FOUND", violations=[unknown])

    async def _models(self, request: Request) -> list[service_pb2.Model]:
        return list((await self._upstream.capabilities(find_key(request, {}))).models)

    async def generate(self, request: Request) -> Response:
        """Rejects the request: an init image is needed."""
        await read_body(request)
        await self._upstream.caller(find_key(request, {}))
        missing = Violation("image", Reason.REQUIRED, _NEEDS_IMAGE)
        raise RequestError(ErrorKind.FIELDS, violations=[missing])

    async def edit(self, request: Request) -> Response:
        """Makes images from an init image and a prompt, and responds when they are finished, or
        with `stream` as they proceed. The job is cancelled if the caller leaves, unless the request
        has an Idempotency-Key: then its repetition gets the same job."""
        key, base = find_key(request, {}), link_base(request, self._settings.public_base_url)
        edit = await requests.read(request, base)
        request_id, wrong = request_ids.find(request)
        if violations := edit.violations + wrong:
            del edit
            await self._upstream.caller(key)  # A wrong key is reported before wrong fields.
            raise RequestError(ErrorKind.FIELDS, violations=violations)
        warning = " ".join(without_effect(edit.ignored))
        try:
            record = await self._upstream.create(
                Creation(key, edit.spec, base, request_id, warning)
            )
        except RequestError as refused:
            refused.violations = list(map(renamed, refused.violations))
            raise
        edit.spec.Clear()  # The init image is freed while its job runs.
        request.state.body.release()
        job = _Job(key, record, needs_caller=request_ids.HEADER not in request.headers)
        if edit.stream:
            headers = responses.headers(record, edit.ignored) | event_stream.HEADERS
            events = self._events(job, edit.partial_images)
            return EventStream(events, headers, on_end=lambda: self._leave(job))
        try:
            return await self._response(request, job, edit)
        finally:
            self._leave(job)

    async def _response(self, request: Request, job: _Job, edit: requests.Edit) -> Response:
        async with (
            background_task(self._collect(job)) as collecting,
            background_task(_until_left(request)) as leaving,
        ):
            await first_of(
                asyncio.wait([collecting, leaving], return_when=asyncio.FIRST_COMPLETED),
                self._stop.wait(),
            )
            if collecting.done():
                collecting.result()
            elif leaving.done():
                raise ClientDisconnect
            else:
                await self._stopped(job)
        headers = responses.headers(job.record, edit.ignored)
        if job.record.state != job_pb2.Job.STATE_SUCCEEDED:
            body, status, more = self._errors.ended(job.record)
            return JSONResponse(body, status, headers | more)
        if edit.links:
            return JSONResponse(responses.links(job.record), headers=headers)
        await self._load(job)
        # Base64 of large images would delay the requests of others.
        return await asyncio.to_thread(
            lambda: JSONResponse(responses.images(job.record, job.images), headers=headers)
        )

    async def _collect(self, job: _Job) -> None:
        async for event in self._upstream.follow(job.key, job.record.id):
            job.take(event)

    async def _events(self, job: _Job, partial_images: int) -> AsyncIterator[bytes]:
        partial = responses.PartialImages(job.record, partial_images)
        following = paced(self._upstream.follow(job.key, job.record.id), self._stop)
        try:
            async with aclosing(following) as events:
                async for event in events:
                    if event is None:
                        yield PING
                        continue
                    job.take(event)
                    if frame := partial.event(event):
                        yield frame
            if not job.is_ended:
                await self._stopped(job)
            if job.record.state != job_pb2.Job.STATE_SUCCEEDED:
                yield responses.error_event(self._errors.ended(job.record)[0])
                return
            await self._load(job)
            for sample in job.record.samples:
                image = job.images.get(sample.index, job_pb2.Image())
                yield await asyncio.to_thread(responses.completed, job.record, sample, image)
        except RequestError as error:
            yield responses.error_event(self._errors.error(error)[0])

    async def _load(self, job: _Job) -> None:
        """Loads images from the bucket if their events are gone, as in the repetition of an old
        request. Stored files are PNG, so all images are loaded then.
        """
        samples = job.record.samples
        if all(sample.index in job.images for sample in samples):
            return
        job.images.clear()
        width, height = job.record.spec.width, job.record.spec.height
        try:
            for sample in samples:
                if data := await read(self._files.blobs, sample.url):
                    image = job_pb2.Image(
                        data=data, media_type="image/png", width=width, height=height
                    )
                    job.images[sample.index] = image
        except StorageError:
            raise RequestError(ErrorKind.UNAVAILABLE) from None

    async def _stopped(self, job: _Job) -> NoReturn:
        """Raises the error for a request that another gateway has to answer."""
        if job.needs_caller:
            job.needs_caller = False
            await self._cancel(job)
        raise RequestError(ErrorKind.UNAVAILABLE, retry_seconds=_WAIT_SECONDS)

    def _leave(self, job: _Job) -> None:
        """Cancels a job whose caller cannot get its images any more, in the background: the task of
        the request may be cancelled itself.
        """
        if job.needs_caller:
            task = asyncio.create_task(self._cancel(job))
            self._cancelling.add(task)
            task.add_done_callback(self._cancelling.discard)

    async def _cancel(self, job: _Job) -> None:
        with suppress(RequestError):  # It has ended, or no api can be reached.
            await self._upstream.cancel(job.key, job.record.id)


async def _until_left(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
