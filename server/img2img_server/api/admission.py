"""Whether a request may become a job: fields, rights, room in the queue, the picture, the time."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from img2img.v1 import job_pb2
from img2img_server import errors
from img2img_server.api import convert
from img2img_server.api.estimate import Estimator
from img2img_server.api.keys import Principal
from img2img_server.api.rate_limit import RateLimit
from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import (
    NARROW_SEED_MAX,
    JobParams,
    Limits,
    ValidationContext,
    validate,
)
from img2img_server.domain.resolve import resolve
from img2img_server.domain.warnings import join_warnings
from img2img_server.imaging.base import CheckedImage, InvalidImageError
from img2img_server.imaging.prepare import check_image, is_cheap
from img2img_server.interfaces.queue import JobQueue
from img2img_server.interfaces.records import WorkerRegistry
from img2img_server.nats.rates import Rates
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.prompts import NO_REWRITER, rewrite
from img2img_server.settings import Settings
from img2img_server.tasks import background_task

# Downloads an init image. Raises InvalidImageError.
Fetch = Callable[[str], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request: its key, the base of its links and its deadline.

    `warning`: what the gateway ignored of the request, for Job.warning.
    """

    principal: Principal
    link_base: str
    remaining_seconds: float | None = None
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may become a job: as understood, with its picture and what is known."""

    params: JobParams
    original_prompt: str
    warning: str
    pixel_steps: int  # the work of the job
    image: CheckedImage
    fetch_seconds: float
    position: int  # jobs before it
    eta_seconds: float | None


class Admission:
    """Admits requests. One for the life of the api."""

    def __init__(
        self,
        settings: Settings,
        queue: JobQueue,
        workers: WorkerRegistry,
        fetch: Fetch,
        rates: Rates,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._workers = workers
        self._fetch = fetch
        self._rate_limit = RateLimit(rates, settings.rate_limit)
        self._estimator = Estimator(queue, workers)
        self._outbound = OutboundPolicy.of(settings)
        self.limits = image_limits(settings)

    async def admit(self, spec: job_pb2.JobSpec, caller: Caller) -> Admitted:
        """Checks in the order of the contract, the cheap before the dear.

        Raises:
            InvalidRequestError, PermissionDeniedError, ModelNotFoundError, QueueFullError,
            RateLimitedError, DeadlineTooShortError, UnavailableError.
        """
        default = self._settings.default_model or await self._announced_model()
        name = spec.model or default
        model = await self._workers.model(name)
        request = convert.request(
            spec, name, model, random_seed=secrets.randbelow(NARROW_SEED_MAX + 1)
        )
        params = request.params
        violations = request.violations + validate(params, self._context(model, params.scheduler))
        if violations:
            raise errors.InvalidRequestError(violations)
        if not params.safety_checker:
            caller.principal.require("unsafe")
        if model is None:
            raise await self._no_model(spec.model, name)
        started = time.monotonic()
        try:
            image, position, eta = await self._examined(request, caller)
        except (errors.InvalidRequestError, errors.DeadlineTooShortError):
            await self._rate_limit.count_refused(caller.principal)
            raise
        await self._rate_limit.count_job(caller.principal)
        original_prompt, rewriting = params.prompt, ""
        if params.enhance_prompt and self._settings.prompt_rewriter == "rules":
            params = replace(params, prompt=rewrite(params.prompt, params.seed))
        elif params.enhance_prompt:
            rewriting = NO_REWRITER
        given = [field.name for field, _ in spec.ListFields()]
        params, resolving = resolve(
            params, model, model.limits(self.limits, params.scheduler), given
        )
        ignored = convert.unknown_fields(spec)
        warning = join_warnings(caller.warning, ignored, *resolving, rewriting)
        seconds = time.monotonic() - started
        work = params.pixel_steps(model.strength_rule)
        return Admitted(params, original_prompt, warning, work, image, seconds, position, eta)

    def _context(self, model: ModelInfo | None, scheduler: str) -> ValidationContext:
        listed = self._outbound.lists_host
        if model is None:
            return ValidationContext(self.limits, loras=None, is_listed=listed)
        limits = model.limits(self.limits, scheduler)
        return ValidationContext(limits, model.schedulers, model.loras, listed)

    async def _no_model(self, named: str, name: str) -> errors.ServiceError:
        """Why there is no model of that name; `named`: the one in the request, mostly empty."""
        known = tuple(info.name for info in await self._workers.models())
        if known and named:
            return errors.ModelNotFoundError(name, known)
        return errors.NoModelError(name, known)

    async def _announced_model(self) -> str:
        """The first by name that is served now, or ever was."""
        serving = sorted(worker.model.name for worker in await self._workers.workers())
        known = serving or [model.name for model in await self._workers.models()]
        return known[0] if known else ""

    async def _examined(
        self, request: convert.Request, caller: Caller
    ) -> tuple[CheckedImage, int, float | None]:
        """The dear checks: the picture, jobs before this one and seconds until it will end."""
        async with background_task(self._estimator.new_job(request.params)) as estimate:
            image = await self._image_given_room(request, caller)
            position, eta, wait = await estimate
        remaining = caller.remaining_seconds
        if remaining is not None and eta is not None and eta > remaining:
            raise errors.DeadlineTooShortError(remaining, eta, wait)
        return image, position, eta

    async def _check_room(self, params: JobParams, caller: Caller) -> None:
        """What is too much is told before the picture is downloaded and decoded."""
        limit, tenant = self._settings.queue_limit, caller.principal.tenant
        unfinished = await self._queue.unfinished(tenant)
        if unfinished >= limit:
            raise errors.QueueFullError(limit, await self._estimator.place(params, unfinished))
        self._rate_limit.check(caller.principal)

    async def _image_given_room(self, request: convert.Request, caller: Caller) -> CheckedImage:
        """The checked picture. A small inline one is decoded while the queue is asked; a full queue
        is told first all the same, and nothing is downloaded or takes long to decode for it."""
        if not request.init_image or not is_cheap(request.init_image):
            await self._check_room(request.params, caller)
            return await self._image(request)
        async with background_task(self._image(request)) as decoded:
            await self._check_room(request.params, caller)
            return await decoded

    async def _image(self, request: convert.Request) -> CheckedImage:
        params = request.params
        try:
            data = request.init_image or await self._fetch(params.init_image_url)
            return await asyncio.to_thread(
                check_image,
                data,
                width=params.width,
                height=params.height,
                limits=self.limits,
                downloaded=not request.init_image,
            )
        except InvalidImageError as error:
            raise errors.InvalidRequestError([error.violation]) from error


def image_limits(settings: Settings) -> Limits:
    """The limits of the contract, with those of pictures as set."""
    return Limits(
        max_image_bytes=settings.max_image_bytes, max_image_pixels=settings.max_image_pixels
    )
