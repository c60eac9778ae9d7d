"""Decides whether a request may become a job: fields, permissions, queue, init image, deadline."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from img2img.v1 import job_pb2
from img2img_server import errors
from img2img_server.api import convert
from img2img_server.api.deps import TENANT_SHARE, ApiDeps
from img2img_server.api.estimate import Estimator
from img2img_server.api.keys import Principal
from img2img_server.api.model_names import default_model, full_name
from img2img_server.api.quota import Quota
from img2img_server.budget import Budget
from img2img_server.domain.models import ModelInfo
from img2img_server.domain.params import (
    NARROW_SEED_MAX,
    JobParams,
    ValidationContext,
    validate,
)
from img2img_server.domain.resolve import fit_size, resolve
from img2img_server.domain.violations import required
from img2img_server.domain.warnings import enlarged, join_warnings
from img2img_server.imaging.base import CheckedImage, InvalidImageError
from img2img_server.imaging.prepare import OWN_MAX_BYTES, Fit
from img2img_server.interfaces.queue import size_of
from img2img_server.nats.rates import Rates
from img2img_server.prompts import NO_REWRITER, rewrite
from img2img_server.tasks import background_task

MISTAKES: Final = 10  # the least number of refused requests that a key may make in a minute


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request: the key, the base of the links and the time until the deadline.

    `warning`: sentences for Job.warning about values that the gateway ignored. `fingerprint`: that
    of the HTTP request, if it differs from the JobSpec.
    """

    principal: Principal
    link_base: str
    remaining_seconds: float | None = None
    warning: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that may become a job, with its init image and its estimates."""

    params: JobParams
    original_prompt: str
    warning: str
    pixel_steps: int  # the cost of the job
    size: int  # the size class of the job in the queue
    image: CheckedImage
    fetch_seconds: float
    position: int  # number of jobs that are queued before this one
    eta_seconds: float | None


class RateLimit:
    """Limits what each key may ask for in a minute.

    A job is counted after all other checks. Requests that are refused after their
    init image was downloaded or decoded have a count of their own: such a mistake does not cost the
    caller a job, and a flood of them is refused before the next download.

    Args:
        per_minute: The limit of keys without a limit of their own; 0: no limit.
    """

    def __init__(self, rates: Rates, per_minute: int) -> None:
        self._rates = rates
        self._per_minute = per_minute

    def check(self, key: Principal) -> None:
        """Checks both limits against the counts that this api has cached. Counts nothing.

        Raises RateLimitedError.
        """
        for refused in (False, True):
            name, most = self._count_of(key, refused)
            if most and (wait := self._rates.wait(name, most)):
                raise errors.RateLimitedError(most, wait)

    async def count(self, key: Principal, *, refused: bool = False) -> None:
        """Counts a job or a refused request.

        Raises:
            RateLimitedError: for a job above the limit.
            UnavailableError.
        """
        name, most = self._count_of(key, refused)
        if most and (wait := await self._rates.take(name, most)) and not refused:
            raise errors.RateLimitedError(most, wait)

    def _count_of(self, key: Principal, refused: bool) -> tuple[str, int]:
        most = self._per_minute if key.rate_limit is None else key.rate_limit
        if most and refused:
            return f"{key.key_id}.refused", max(most, MISTAKES)
        return key.key_id, most


class Admission:
    """Admits requests."""

    def __init__(self, deps: ApiDeps, estimator: Estimator, quota: Quota) -> None:
        self._deps = deps
        self._estimator = estimator
        self._quota = quota
        self._rate_limit = RateLimit(deps.bus.rates, deps.settings.rate_limit)
        settings = deps.settings
        self._downloads = Budget(
            "downloads",
            settings.max_fetches,
            int(settings.max_fetches * TENANT_SHARE),
            wait_seconds=settings.admission_wait_seconds,
        )

    async def admit(self, spec: job_pb2.JobSpec, caller: Caller) -> Admitted:
        """Checks a request in the order of the HTTP contract, the cheapest checks first.

        Raises:
            InvalidRequestError, PermissionDeniedError, ModelNotFoundError, QueueFullError,
            RateLimitedError, DeadlineTooShortError, UnavailableError.
        """
        request, model = await self._valid(spec, caller)
        params = request.params
        started = time.monotonic()
        try:
            image, position, eta = await self._examine(request, model, caller)
        except (errors.InvalidRequestError, errors.DeadlineTooShortError):
            await self._rate_limit.count(caller.principal, refused=True)
            raise
        await self._rate_limit.count(caller.principal)
        original_prompt, size = params.prompt, (image.width, image.height)
        params, warning = self._resolved(spec, request, model, caller, size)
        return Admitted(
            params=params,
            original_prompt=original_prompt,
            warning=join_warnings(warning, enlarged(image.own_size, size)),
            pixel_steps=model.pixel_steps(params),
            size=size_of(model.work(params)),
            image=image,
            fetch_seconds=time.monotonic() - started,
            position=position,
            eta_seconds=eta,
        )

    async def resolve(
        self, spec: job_pb2.JobSpec, caller: Caller
    ) -> tuple[JobParams, ModelInfo, str]:
        """Checks a request without its init image, which may be absent.

        Returns:
            The parameters that its job would have, its model, and the warning of its job.

        Raises:
            InvalidRequestError, PermissionDeniedError, ModelNotFoundError, UnavailableError.
        """
        request, model = await self._valid(spec, caller, needs_image=False)
        fit = self._fit(request, model)
        square = model.native_size, model.native_size
        size = fit(square) if fit else (request.params.width, request.params.height)
        params, warning = self._resolved(spec, request, model, caller, size)
        return params, model, warning

    async def _valid(
        self, spec: job_pb2.JobSpec, caller: Caller, *, needs_image: bool = True
    ) -> tuple[convert.Request, ModelInfo]:
        """Returns the request and its model, if its fields are valid and the key permits them.

        Raises:
            InvalidRequestError, PermissionDeniedError, ModelNotFoundError, UnavailableError.
        """
        name = await self._model_name(spec.model)
        model = await self._deps.workers.model(name)
        request = convert.request(
            spec, name, model, self._deps.limits, random_seed=secrets.randbelow(NARROW_SEED_MAX + 1)
        )
        params = request.params
        violations = request.violations + validate(params, self._context(model, params.scheduler))
        if not needs_image:
            missing = required("init_image")
            violations = [violation for violation in violations if violation != missing]
        if violations:
            raise errors.InvalidRequestError(violations)
        if not params.safety_checker:
            caller.principal.require("unsafe")
        if model is None:
            raise await self._no_model(spec.model, name)
        return request, model

    def _resolved(
        self,
        spec: job_pb2.JobSpec,
        request: convert.Request,
        model: ModelInfo,
        caller: Caller,
        size: tuple[int, int],
    ) -> tuple[JobParams, str]:
        """Returns the parameters of the job and its warning. `size`: width and height."""
        params = replace(request.params, width=size[0], height=size[1])
        rewriting = ""
        if params.enhance_prompt and self._deps.settings.prompt_rewriter == "rules":
            params = replace(params, prompt=rewrite(params.prompt, params.seed))
        elif params.enhance_prompt:
            rewriting = NO_REWRITER
        limits = model.limits(self._deps.limits, params.scheduler)
        params, resolving = resolve(params, model, limits)
        ignored = convert.unknown_fields(spec)
        return params, join_warnings(caller.warning, ignored, *resolving, rewriting)

    def _context(self, model: ModelInfo | None, scheduler: str) -> ValidationContext:
        listed = self._deps.policy.lists_host
        if model is None:
            return ValidationContext(self._deps.limits, loras=None, is_listed=listed)
        limits = model.limits(self._deps.limits, scheduler)
        return ValidationContext(limits, model.schedulers, model.loras, listed)

    async def _no_model(self, named: str, name: str) -> errors.ServiceError:
        """Returns the error for an unknown model. `named`: the model in the request, if any."""
        known = tuple(info.name for info in await self._deps.workers.models())
        if known and named:
            return errors.ModelNotFoundError(name, known)
        return errors.NoModelError(name, known)

    async def _model_name(self, named: str) -> str:
        """Returns the name of the model that a request means. `named`: that in the request."""
        workers, setting = self._deps.workers, self._deps.settings.default_model
        if not named and not setting:
            return default_model("", await workers.models(), await workers.workers())
        name = named or setting
        if await workers.model(name) is not None:
            return name
        return full_name(name, await workers.models())

    async def _examine(
        self, request: convert.Request, model: ModelInfo, caller: Caller
    ) -> tuple[CheckedImage, int, float | None]:
        """Makes the expensive checks.

        Returns:
            The init image, the number of jobs before this one and the seconds until it ends.
        """
        tenant = caller.principal.tenant
        limits = model.limits(self._deps.limits, request.params.scheduler)
        params, _ = resolve(request.params, model, limits)  # The number of steps that will run.
        if self._fit(request, model) is None:  # The size is known without the init image.
            estimating = self._estimator.new_job(params, tenant, model)
            async with background_task(estimating) as estimate:
                image = await self._image_given_room(request, model, caller)
                position, eta, wait = await estimate
        else:
            image = await self._image_given_room(request, model, caller)
            params = replace(params, width=image.width, height=image.height)
            position, eta, wait = await self._estimator.new_job(params, tenant, model)
        remaining = caller.remaining_seconds
        if remaining is not None and eta is not None and eta > remaining:
            raise errors.DeadlineTooShortError(remaining, eta, wait)
        return image, position, eta

    async def _check_room(self, params: JobParams, model: ModelInfo, caller: Caller) -> None:
        """Raises QueueFullError, RateLimitedError."""
        limit, tenant = self._deps.settings.queue_limit, caller.principal.tenant
        unfinished = await self._quota.unfinished(tenant)
        if unfinished >= limit:
            wait = await self._estimator.place(params, tenant, model)
            raise errors.QueueFullError(limit, wait)
        self._rate_limit.check(caller.principal)

    async def _image_given_room(
        self, request: convert.Request, model: ModelInfo, caller: Caller
    ) -> CheckedImage:
        """Returns the checked init image, if the queue and the rate limit have room.

        A small inline file is decoded while the queue is asked; its errors come second. Otherwise
        nothing is downloaded or decoded before there is room.
        """
        tenant = caller.principal.tenant
        if not 0 < len(request.init_image) <= OWN_MAX_BYTES:
            await self._check_room(request.params, model, caller)
            return await self._image(request, model, tenant)
        async with background_task(self._image(request, model, tenant)) as decoded:
            await self._check_room(request.params, model, caller)
            return await decoded

    async def _image(self, request: convert.Request, model: ModelInfo, tenant: str) -> CheckedImage:
        """Downloads and checks an init image within the tenant's shares of the budgets.

        The bytes of an inline image count as bytes of its request.
        """
        params, decoder = request.params, self._deps.decoder
        with self._deps.downloaded.try_take(tenant, 0) as held:
            try:
                data = request.init_image
                if request.upload:
                    data = await self._deps.uploads.content(tenant, request.upload, held.resize)
                elif not data:
                    with await self._downloads.take(tenant, 1):
                        data = await self._deps.fetch(params.init_image_url, held.resize)
                return await decoder.check(
                    tenant,
                    data,
                    width=params.width,
                    height=params.height,
                    limits=self._deps.limits,
                    downloaded=bool(params.init_image_url),
                    fit=self._fit(request, model),
                )
            except InvalidImageError as error:
                raise errors.InvalidRequestError([error.violation]) from error

    def _fit(self, request: convert.Request, model: ModelInfo) -> Fit | None:
        """Returns the function that sets the sides which the caller left open; None if there are
        none.
        """
        sides = {name: getattr(request.params, name) for name in ("width", "height")}
        given = {name: side for name, side in sides.items() if name in request.given}
        if len(given) == 2:
            return None
        limits = model.limits(self._deps.limits, request.params.scheduler)
        return partial(fit_size, given, model.native_size, limits)
