"""ModelsLab's sentences about rejected requests, by field and reason.

Our own sentences, in domain/violations.py and errors.py, may be reworded; ModelsLab's may not.
"""

from __future__ import annotations

from collections.abc import Mapping

from img2img_server.domain.violations import Reason, Violation

# The entry of the field itself takes precedence over the entry without a field.
_FIELDS: dict[tuple[str, str], str] = {
    ("init_image", Reason.DOWNLOAD_FAILED): "Unable to fetch image from provided URL",
    ("init_image", Reason.INVALID_IMAGE): "init_image is not a valid PNG, JPG or WebP image",
    ("init_image", Reason.TOO_MANY_BYTES): "init_image must not be larger than {max_megabytes} MB",
    ("init_image", Reason.TOO_MANY_PIXELS): (
        "init_image must not have more than {max_megapixels} megapixels"
    ),
    ("deploy_type", Reason.NOT_SUPPORTED): "deploy_type is invalid",
    ("deploy_type", Reason.INVALID_TYPE): "deploy_type is invalid",
    ("", Reason.REQUIRED): "{field} is required",
    ("", Reason.INVALID_TYPE): "{field} must be {expected}",
    ("", Reason.OUT_OF_RANGE): "{field} must be between {min} and {max}",
    ("", Reason.NOT_DIVISIBLE): "{field} must be divisible by {divisor}",
    ("", Reason.TOO_LONG): "{field} must not be longer than {max} characters",
    ("", Reason.INVALID_URL): "{field} must be a valid URL",
    ("", Reason.FORBIDDEN_ADDRESS): "{field} must be a public address",
}
# Reasons of errors of which ModelsLab has no sentence, so that its callers get our own. For every
# other reason they get that of the error kind.
OURS = frozenset(
    {
        "API_KEY_EXPIRED",
        "JOB_ENDED",
        "MESSAGE_TOO_LARGE",
        "NO_MODEL",
        "PERMISSION_DENIED",
        "QUEUE_FULL",
        "RATE_LIMITED",
        "REQUEST_ID_REUSED",
        "STORAGE_KEYS_MISSING",
        "STREAM_TOKEN_EXPIRED",
        "STREAM_TOKEN_KEYS_MISSING",
        "TOO_MANY_CALLS",
        "UPLOADS_DISABLED",
        "UPLOADS_FULL",
        "UPLOAD_EXPIRED",
        "UPLOAD_INCOMPLETE",
        "UPLOAD_NOT_FOUND",
    }
)
ERRORS = {
    "QUEUE_FULL": "Rate limit exceeded. Maximum {limit} queued requests allowed.",
    "RATE_LIMITED": "Rate limit exceeded. Maximum {per_minute} requests per minute allowed.",
    "TOO_MANY_CALLS": "Rate limit exceeded. Maximum {limit} open calls allowed.",
}


def field_sentence(violation: Violation) -> str:
    """Returns ModelsLab's sentence for a broken rule, or our own if ModelsLab has none."""
    name, reason = violation.field, violation.reason
    template = _FIELDS.get((name, reason)) or _FIELDS.get(("", reason)) or ""
    return _filled(template, {**violation.values, "field": name}) or violation.message


def legacy_field_sentence(violation: Violation) -> str:
    """Returns the sentence of ModelsLab's older validator: "The prompt field is required."."""
    if violation.reason == Reason.REQUIRED:
        return f"The {violation.field} field is required."
    sentence = field_sentence(violation)
    begins_with_field = sentence.startswith(f"{violation.field} ")
    return f"The {sentence}." if begins_with_field else f"{sentence}."


def error_sentence(reason: str, metadata: Mapping[str, str]) -> str:
    """Returns ModelsLab's sentence for an error of the api, or "" if ModelsLab has none.

    Args:
        reason: The reason of google.rpc.ErrorInfo.
        metadata: The metadata of google.rpc.ErrorInfo.
    """
    return _filled(ERRORS.get(reason, ""), metadata)


def _filled(template: str, values: Mapping[str, str]) -> str:
    try:
        return template.format_map(values)
    except KeyError:  # An api of another version may send fewer values.
        return ""
