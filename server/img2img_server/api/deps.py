"""The dependencies that the components of the api share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from img2img_server.api.uploads import Uploads
from img2img_server.api.worker_cache import CachedWorkerRegistry
from img2img_server.budget import Budget
from img2img_server.domain.params import Limits
from img2img_server.imaging.decoder import ImageDecoder
from img2img_server.interfaces.records import JobStore
from img2img_server.nats.bus import Bus
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.settings import Settings

TENANT_SHARE: Final = 0.75  # the most of a budget that one tenant holds

# Downloads an init image and reports the received bytes as they grow. Raises InvalidImageError, and
# the errors of the report.
Fetch = Callable[[str, Callable[[int], None]], Awaitable[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiDeps:
    """The interfaces and settings of the api. `workers`: the registry of `bus`, cached.
    `link_base`: the base of the links of gRPC callers. `limits`: the limits of the service. `stop`:
    set when the api stops. `downloaded`: the bytes of init images that are read from elsewhere.
    """

    settings: Settings
    bus: Bus
    workers: CachedWorkerRegistry
    fetch: Fetch
    decoder: ImageDecoder
    policy: OutboundPolicy
    limits: Limits
    link_base: str
    stop: asyncio.Event
    downloaded: Budget
    uploads: Uploads

    @property
    def jobs(self) -> JobStore:
        return self.bus.jobs


def service_limits(settings: Settings) -> Limits:
    """Returns the limits of the service. Those of a model may be narrower."""
    return Limits(
        max_side_pixels=settings.max_side_pixels,
        max_image_bytes=settings.max_image_bytes,
        max_image_pixels=settings.max_image_pixels,
    )


def downloaded_bytes(settings: Settings) -> Budget:
    """Returns the budget of the bytes of init images that are read from elsewhere."""
    total = settings.max_fetched_bytes
    return Budget("downloaded bytes", total, int(total * TENANT_SHARE))
