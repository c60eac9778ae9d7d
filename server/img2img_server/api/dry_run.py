"""Estimates jobs without creating them."""

from __future__ import annotations

from typing import Final

from img2img.v1 import job_pb2, service_pb2
from img2img_server.api import convert
from img2img_server.api.admission import Admission, Caller
from img2img_server.api.deps import ApiDeps
from img2img_server.api.estimate import Estimator
from img2img_server.domain.price import Price
from img2img_server.domain.warnings import join_warnings

_SQUARE: Final = (
    "The init image is not read for an estimate: width and height that the request leaves out are "
    "those of a square init image."
)


class DryRun:
    """Implements EstimateJob."""

    def __init__(self, deps: ApiDeps, admission: Admission, estimator: Estimator) -> None:
        self._admission = admission
        self._estimator = estimator
        self._price = Price.parse(deps.settings.device_second_price)

    async def estimate(
        self, spec: job_pb2.JobSpec, caller: Caller
    ) -> service_pb2.EstimateJobResponse:
        """Raises what Admission.resolve raises."""
        params, model, warning = await self._admission.resolve(spec, caller)
        if spec.HasField("init_image") and not (spec.HasField("width") and spec.HasField("height")):
            warning = join_warnings(warning, _SQUARE)
        position, seconds, wait = await self._estimator.new_job(
            params, caller.principal.tenant, model
        )
        device_seconds = await self._estimator.device_seconds(params, model)
        response = service_pb2.EstimateJobResponse(
            spec=convert.spec(params),
            warning=warning,
            device_seconds=device_seconds,
            position=position,
            price=self._price.of(device_seconds),
            currency=self._price.currency if device_seconds else "",
            denoising_steps=model.denoising_steps(params) if model.knows_steps(params) else None,
        )
        if seconds is not None:
            response.wait.CopyFrom(convert.duration(wait))
            # Both are means of different jobs, but no job ends before the device has worked on it.
            response.eta.CopyFrom(convert.duration(max(seconds, wait + device_seconds)))
        return response
