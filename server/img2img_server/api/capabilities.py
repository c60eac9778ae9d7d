"""What the service tells about itself: the models being served and the limits in force."""

from __future__ import annotations

from collections.abc import Sequence

from img2img.v1 import service_pb2
from img2img_server import __version__
from img2img_server.api import convert
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import Limits
from img2img_server.images.header import Container
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
            max_prompt_characters=limits.max_prompt_characters,
            min_side_pixels=limits.min_side_pixels,
            max_side_pixels=limits.max_side_pixels,
            side_multiple=limits.side_multiple,
            max_samples=limits.max_samples,
            max_num_inference_steps=limits.max_num_inference_steps,
            max_guidance_scale=limits.max_guidance_scale,
            max_image_bytes=limits.max_image_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_message_bytes=settings.max_message_bytes,
            max_queued_jobs=settings.queue_limit,
            max_negative_prompt_characters=limits.max_negative_prompt_characters,
            max_lora_scale=limits.max_lora_scale,
            max_preview_interval_steps=limits.max_preview_interval_steps,
            max_annotations=limits.max_annotations,
            max_annotation_name_characters=limits.max_annotation_name_characters,
            max_annotation_characters=limits.max_annotation_characters,
            max_track_id_characters=limits.max_track_id_characters,
            max_url_characters=limits.max_url_characters,
            max_seed=limits.max_seed,
            min_strength=limits.min_strength,
            max_strength=limits.max_strength,
            retention=convert.duration(settings.retention_hours * 3600),
            init_image_media_types=[container.media_type for container in Container],
        ),
    )
