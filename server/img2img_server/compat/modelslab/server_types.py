"""ModelsLab's server types, for each of which a tenant may store S3 details."""

from __future__ import annotations

from img2img_server.domain.storage import REALTIME
from img2img_server.domain.violations import Reason, Violation

# The service keeps the details of these types and never uses them.
WITHOUT_EFFECT = frozenset(
    {
        "text_to_image",
        "image_editing",
        "voice_cloning",
        "text_to_3d",
        "video",
        "face_gen",
        "deepfake",
        "super_resolution",
        "flux",
        "flux_headshot",
        "interior",
        "qwen",
        "qwen_tts",
        "flux_kontext_dev",
        "image_to_video_ultra",
        "z_image_turbo",
    }
)


def validate_server_type(deploy_type: str) -> list[Violation]:
    """Returns a violation for a name that is no server type, else an empty list."""
    if deploy_type == REALTIME or deploy_type in WITHOUT_EFFECT:
        return []
    message = "deploy_type is not a known server type"
    return [Violation("deploy_type", Reason.NOT_SUPPORTED, message)]
