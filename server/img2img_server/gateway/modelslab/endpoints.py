"""The routes img2img and fetch of ModelsLab's contract: docs/http-contract.md#responses, #fetch."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import JSONResponse

from img2img.v1 import job_pb2
from img2img_server import idempotency
from img2img_server.compat.modelslab import names, requests, responses
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.files import inline
from img2img_server.compat.modelslab.response_formats import Current
from img2img_server.domain.params import ValidationContext
from img2img_server.domain.violations import required
from img2img_server.domain.warnings import join_warnings
from img2img_server.errors import StorageError
from img2img_server.gateway.http import request_ids
from img2img_server.gateway.http.files import Files
from img2img_server.gateway.http.http_request import find_key, link_base, read_json
from img2img_server.gateway.openapi import BODY, body, outcomes
from img2img_server.gateway.upstream import Creation, Upstream
from img2img_server.lifecycle import StoppedError, unless_stopped
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.settings import Settings

ENTERPRISE = "/api/v1/enterprise/realtime"
V6 = "/api/v6/realtime"
V6_IMAGES = "/api/v6/images"
_MAX_ID_CHARACTERS = 12
_KEY_REUSED = f"{request_ids.HEADER} was used for a different request"
JobId = Annotated[str, Path(description="The `id` of the response to img2img.")]


class Endpoints:
    """Answers img2img and fetch."""

    def __init__(
        self,
        settings: Settings,
        upstream: Upstream,
        files: Files,
        response_format: Current,
        stop: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._upstream = upstream
        self._files = files
        self._format = response_format
        self._stop = stop
        policy = OutboundPolicy.of(settings)
        self._context = ValidationContext(requests.LIMITS, is_listed=policy.lists_host)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["img2img"])
        creating = (ErrorKind.FORBIDDEN, ErrorKind.REQUEST_ID_REUSED, ErrorKind.RATE_LIMIT)
        failing = [*BODY, ErrorKind.FIELDS, *creating]
        found = outcomes("Success", "Processing", "Failed", errors=failing)
        for family in (ENTERPRISE, V6):
            extra = body("Img2ImgRequest") | request_ids.PARAMETERS
            router.post(f"{family}/img2img", responses=found, openapi_extra=extra)(self.img2img)
        failing = [*BODY, ErrorKind.FIELDS, ErrorKind.UNKNOWN_JOB]
        found = outcomes("Success", "Processing", "Failed", errors=failing)
        for family in (ENTERPRISE, V6, V6_IMAGES):
            path, extra = f"{family}/fetch/{{job_id}}", body("KeyRequest", required=False)
            router.get(path, responses=found)(self.fetch)
            router.post(path, responses=found, openapi_extra=extra)(self.fetch)
        for path in ("/api/v1/enterprise/fetch", f"{V6_IMAGES}/fetch"):
            extra = body("FetchRequest")
            router.post(path, responses=found, openapi_extra=extra)(self.fetch_by_body)
        return router

    async def img2img(self, request: Request) -> JSONResponse:
        """Responds when the job has ended, or after a while, or at once with `instant_response` or
        `webhook`. A job that has not ended is fetched later."""
        sent = await read_json(request)
        key, parsed = find_key(request, sent), requests.read(sent, self._context)
        del sent  # Fields that are no longer needed are freed while the job runs.
        request_id, wrong = request_ids.find(request)
        if violations := parsed.violations + wrong:
            del parsed
            await self._upstream.caller(key)  # A wrong key is reported before wrong fields.
            raise RequestError(ErrorKind.FIELDS, violations=violations)
        base = link_base(request, self._settings.public_base_url)
        spec, warnings = requests.job_spec(parsed.values, base), parsed.warnings
        at_once = bool(parsed.values.get("instant_response") or spec.webhook)
        del parsed
        creation = Creation(key, spec, base, request_id)
        job = await self._make(creation, warnings)
        del creation
        del spec  # The init image is freed while its job runs.
        request.state.body.release()
        if self._settings.wait_seconds > 0 and not at_once:
            job = await self._wait(key, job)
        return await self._respond(request, job, fetched=False)

    async def _make(self, creation: Creation, warnings: list[str]) -> job_pb2.Job:
        # Legacy mode has only the warnings of the original API.
        warning = "" if self._settings.legacy else join_warnings(*warnings)
        spec = creation.spec
        try:
            return await self._upstream.create(replace(creation, warning=warning))
        except RequestError as refused:
            if refused.kind is ErrorKind.REQUEST_ID_REUSED:
                raise RequestError(refused.kind, _KEY_REUSED, metadata=refused.metadata) from None
            broken = {violation.field: violation.message for violation in refused.violations}
            # The caller may repeat the request with the hints.
            fingerprint = creation.fingerprint or idempotency.fingerprint(spec)
            # The model's limits may be narrower than the contract's, but a hint is never an error.
            if dropped := requests.drop_hints(spec, broken):
                more = [
                    requests.ignored(name, broken[name].replace(name, "it", 1)) for name in dropped
                ]
                again = replace(creation, fingerprint=fingerprint)
                return await self._make(again, [*warnings, *more])
            refused.violations = requests.merge(requests.Img2ImgRequest, refused.violations)
            raise

    async def fetch(self, request: Request, job_id: JobId) -> JSONResponse:
        """Responds at once with the state of the job."""
        key = find_key(request, await read_json(request) if request.method == "POST" else {})
        job = await self._upstream.get(key, job_id)
        return await self._respond(request, job, fetched=True)

    async def fetch_by_body(self, request: Request) -> JSONResponse:
        """Responds at once with the state of the job."""
        sent = await read_json(request)
        key, job_id = find_key(request, sent), sent.get("request_id")
        del sent
        if job_id is None or job_id == "":
            await self._upstream.caller(key)
            raise RequestError(ErrorKind.FIELDS, violations=[required("request_id")])
        job_id = str(job_id) if type(job_id) in (int, str) else ""
        if not job_id.isascii() or len(job_id) > _MAX_ID_CHARACTERS:
            job_id = ""  # No job has this id. A long text is not kept in memory during the call.
        job = await self._upstream.get(key, job_id)
        return await self._respond(request, job, fetched=True)

    async def _wait(self, key: str, job: job_pb2.Job) -> job_pb2.Job:
        """Returns the job once it has ended, or in its current state after `wait_seconds` or when
        the gateway stops."""
        with suppress(TimeoutError, StoppedError):
            async with asyncio.timeout(self._settings.wait_seconds):
                return await unless_stopped(self._stop, self._upstream.ended(key, job.id))
        with suppress(RequestError):  # The job exists, so the caller can fetch it later.
            return await self._upstream.get(key, job.id)
        return job

    async def _respond(self, request: Request, job: job_pb2.Job, *, fetched: bool) -> JSONResponse:
        if job.state in (job_pb2.Job.STATE_FAILED, job_pb2.Job.STATE_CANCELLED):
            return JSONResponse(self._format.failed(job))
        if job.state == job_pb2.Job.STATE_SUCCEEDED:
            try:
                output = responses.links(job)
                if self._settings.base64_inline and job.spec.base64:
                    output = await inline(self._files.blobs, output)
                return JSONResponse(self._format.success(job, output, fetched=fetched))
            except StorageError:
                if fetched:
                    raise RequestError(ErrorKind.UNAVAILABLE) from None
                # The caller must learn the id of the new job. A later fetch returns the links.
        path, base = request.scope["path"], job.spec.annotations.get(names.LINK_BASE)
        # jobs that were created over gRPC have no such annotation
        base = base or link_base(request, self._settings.public_base_url)
        family = next((each for each in (V6, V6_IMAGES) if path.startswith(each)), ENTERPRISE)
        fetch_result = f"{base}{family}/fetch/{job.id}"
        return JSONResponse(self._format.processing(job, fetch_result, fetched=fetched))
