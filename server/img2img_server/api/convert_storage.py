"""Storage details between protobuf and the domain; beside convert.py, which has the rest."""

from __future__ import annotations

from dataclasses import fields

from img2img.v1 import service_pb2
from img2img_server.domain.storage import StorageDetails

_DETAILS = tuple(field.name for field in fields(StorageDetails))
_SECRETS = ("aws_access_key_id", "aws_secret_access_key")


def storage_details(settings: service_pb2.StorageSettings) -> StorageDetails:
    """Storage details as sent; not validated."""
    return StorageDetails(**{name: getattr(settings, name) for name in _DETAILS})


def storage_settings(details: StorageDetails, deploy_type: str) -> service_pb2.StorageSettings:
    """Storage details as they may be given back: without key and secret."""
    shown = {name: getattr(details, name) for name in _DETAILS if name not in _SECRETS}
    return service_pb2.StorageSettings(deploy_type=deploy_type, **shown)
