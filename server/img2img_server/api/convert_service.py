"""Converts storage settings, capabilities and errors to protobuf. convert.py converts jobs and
events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from img2img.v1 import service_pb2
from img2img_server import __version__, errors
from img2img_server.api import convert
from img2img_server.api.model_names import default_model
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import Limits
from img2img_server.domain.storage import StorageDetails
from img2img_server.imaging.header import Container
from img2img_server.nats.uploads import UploadRecord
from img2img_server.settings import Settings

_DETAILS = tuple(field.name for field in fields(StorageDetails))
_SECRETS = ("aws_access_key_id", "aws_secret_access_key")


def storage_details(settings: service_pb2.StorageSettings) -> StorageDetails:
    """Returns storage settings of a request, not validated."""
    return StorageDetails(**{name: getattr(settings, name) for name in _DETAILS})


def storage_settings(details: StorageDetails, deploy_type: str) -> service_pb2.StorageSettings:
    """Returns storage settings for a response: without key and secret."""
    shown = {name: getattr(details, name) for name in _DETAILS if name not in _SECRETS}
    return service_pb2.StorageSettings(deploy_type=deploy_type, **shown)


def upload(record: UploadRecord) -> service_pb2.Upload:
    """Returns the Upload message of a record."""
    return service_pb2.Upload(
        name=f"uploads/{record.id}",
        sha256=record.sha256,
        size_bytes=record.size_bytes,
        media_type=record.media_type,
        complete=record.is_complete,
        create_time=convert.timestamp(record.create_time),
        expire_time=convert.timestamp(record.expire_time),
    )


def capabilities(
    settings: Settings, limits: Limits, models: Sequence[ModelInfo], workers: list[WorkerInfo]
) -> service_pb2.GetCapabilitiesResponse:
    """Returns the models, the default one first and the others by name, and the limits.

    Args:
        workers: All that are announced.
    """
    default = default_model(settings.default_model, models, workers)
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


def status_of(error: errors.ServiceError) -> status_pb2.Status:
    """Returns the status with its details: ErrorInfo, and BadRequest or RetryInfo if they apply."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason, domain=errors.DOMAIN, metadata=error.metadata
    )
    details: list[Message] = [info]
    if isinstance(error, errors.InvalidRequestError):
        bad = error_details_pb2.BadRequest()
        for violation in error.violations:
            bad.field_violations.add(
                field=violation.field, description=violation.text, reason=violation.reason
            )
        details.append(bad)
    if error.retry_seconds is not None:
        retry_delay = convert.duration(error.retry_seconds)
        details.append(error_details_pb2.RetryInfo(retry_delay=retry_delay))
    status = status_pb2.Status(code=error.code.value, message=str(error))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status
