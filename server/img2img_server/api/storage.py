"""The calls that store and remove a tenant's S3 details."""

from __future__ import annotations

import structlog

from img2img.v1 import service_pb2
from img2img_server import errors
from img2img_server.api.convert_storage import storage_details, storage_settings
from img2img_server.api.keys import Principal
from img2img_server.compat.modelslab.server_types import WITHOUT_EFFECT, validate_server_type
from img2img_server.domain.storage import (
    REALTIME,
    validate_storage,
)
from img2img_server.domain.violations import Reason, Violation
from img2img_server.nats.tenant_settings import TenantStorage
from img2img_server.outbound.policy import ForbiddenAddressError, OutboundPolicy
from img2img_server.storage.tenant_s3 import TenantS3

log = structlog.get_logger()


class StorageCalls:
    """Answers UpdateStorageSettings and ResetStorageSettings."""

    def __init__(self, storage: TenantStorage, policy: OutboundPolicy) -> None:
        self._storage = storage
        self._policy = policy
        self._s3 = TenantS3(policy)

    async def update(
        self, principal: Principal, request: service_pb2.UpdateStorageSettingsRequest
    ) -> service_pb2.UpdateStorageSettingsResponse:
        """Raises PermissionDeniedError, InvalidRequestError, StorageKeysMissingError."""
        principal.require("storage")
        deploy_type = request.settings.deploy_type or REALTIME
        details = storage_details(request.settings)
        violations = validate_server_type(deploy_type) + validate_storage(details)
        if all(violation.field != "endpoint_url" for violation in violations):
            violations += self._forbidden(details.endpoint_url)
        if violations:
            raise errors.InvalidRequestError(violations)
        if not self._storage.can_store:
            raise errors.StorageKeysMissingError
        warnings = []
        if deploy_type in WITHOUT_EFFECT:
            text = f"deploy_type {deploy_type} is stored without effect: only realtime runs here"
            warnings.append(text)
        if request.check_connection:
            to_blame, warning = await self._s3.check(details)
            if to_blame:
                raise errors.InvalidRequestError([to_blame])
            warnings.append(warning)
        version = await self._storage.put(principal.tenant, deploy_type, details)
        log.info("S3 details stored", tenant=principal.tenant, type=deploy_type, version=version)
        return service_pb2.UpdateStorageSettingsResponse(
            settings=storage_settings(details, deploy_type),
            warning="; ".join(filter(None, warnings)),
        )

    async def reset(
        self, principal: Principal, request: service_pb2.ResetStorageSettingsRequest
    ) -> service_pb2.ResetStorageSettingsResponse:
        """Raises PermissionDeniedError, InvalidRequestError."""
        principal.require("storage")
        deploy_type = request.deploy_type or REALTIME
        if violations := validate_server_type(deploy_type):
            raise errors.InvalidRequestError(violations)
        await self._storage.remove(principal.tenant, deploy_type)
        log.info("S3 details reset", tenant=principal.tenant, type=deploy_type)
        return service_pb2.ResetStorageSettingsResponse(deploy_type=deploy_type)

    def _forbidden(self, endpoint_url: str) -> list[Violation]:
        """What can be told without resolving its name; the worker resolves and checks again."""
        try:
            self._policy.check_url(endpoint_url)
        except ForbiddenAddressError:
            message = "endpoint_url must be a public address"
            return [Violation("endpoint_url", Reason.FORBIDDEN_ADDRESS, message)]
        return []
