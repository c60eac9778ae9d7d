"""What the service tells about itself: the models being served and the limits in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from img2img.v1 import service_pb2
from img2img_server import __version__
from img2img_server.api import convert
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import Limits
from img2img_server.imaging.header import Container
from img2img_server.settings import Settings


def capabilities(
    settings: Settings, limits: Limits, models: Sequence[ModelInfo], workers: list[WorkerInfo]
) -> service_pb2.GetCapabilitiesResponse:
    """The answer of GetCapabilities: the default model first, the others by name."""
    default = settings.default_model
    ordered = sorted(models, key=lambda model: (model.name != default, model.name))
    return service_pb2.GetCapabilitiesResponse(
        server_version=__version__,
        models=[convert.model(info, workers, limits) for info in ordered],
        limits=service_pb2.Limits(
            **asdict(limits),
            max_message_bytes=settings.max_message_bytes,
            max_queued_jobs=settings.queue_limit,
            retention=convert.duration(settings.retention_hours * 3600),
            init_image_media_types=[container.media_type for container in Container],
        ),
    )
