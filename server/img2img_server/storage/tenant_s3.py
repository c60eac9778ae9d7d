"""Uploads to a tenant's own S3 storage, under the outbound policy.

The minio SDK signs a request, and the session of the policy sends it to addresses that it has
checked. The bucket may also be part of the host name, and there is no client of the SDK for each
tenant.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import uuid
from datetime import UTC, datetime
from typing import Final
from urllib.parse import urlsplit

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver
from minio.credentials.credentials import Credentials
from minio.signer import sign_v4_s3
from yarl import URL

from img2img_server.domain.storage import StorageDetails
from img2img_server.domain.violations import Reason, Violation
from img2img_server.errors import StorageError
from img2img_server.outbound.causes import cause_of
from img2img_server.outbound.policy import ForbiddenAddressError, OutboundPolicy, shown

TRIES: Final = 3
FIRST_PAUSE_SECONDS: Final = 0.2
TRY_SECONDS: Final = 20.0
# bytes that are read of an error response; the error code is near its start
_ANSWER_BYTES: Final = 4096
_CODE: Final = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_TIMEOUT: Final = aiohttp.ClientTimeout(total=TRY_SECONDS, sock_connect=3.0)

log = structlog.get_logger()


CHECK_TEXT: Final = b"A connection check of img2img; it may be deleted.\n"
_TO_BLAME: Final = {
    "InvalidAccessKeyId": ("aws_access_key_id", "is not known to the storage"),
    "SignatureDoesNotMatch": ("aws_secret_access_key", "does not fit the access key"),
    "AccessDenied": ("aws_access_key_id", "may not store files in the bucket"),
    "NoSuchBucket": ("bucket", "is not there"),
    "InvalidBucketName": ("bucket", "is no name of a bucket"),
    "AuthorizationHeaderMalformed": ("region_name", "is not that of the bucket"),
    "PermanentRedirect": ("region_name", "is not that of the bucket"),
    "TemporaryRedirect": ("region_name", "is not that of the bucket"),
    "IllegalLocationConstraintException": ("region_name", "is not that of the bucket"),
}


class _RefusedError(Exception):
    """The store answered, but did not take the file."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}".rstrip())
        self.code = code


class TenantS3:
    """Stores files in the storage of a tenant.

    Args:
        resolver: Resolves names; DNS by default.
    """

    def __init__(self, policy: OutboundPolicy, resolver: AbstractResolver | None = None) -> None:
        self._policy = policy
        self._resolver = resolver

    async def put(self, details: StorageDetails, name: str, data: bytes, media_type: str) -> None:
        """Stores a file with ACL public-read; without it where the store refuses it.

        Raises:
            StorageError: Three attempts failed, or the address is forbidden; the log has the cause.
        """
        url = details.upload_url(name)
        for left in reversed(range(TRIES)):
            try:
                await self._try(details, url, data, media_type)
            except ForbiddenAddressError as error:
                log.warning("tenant_upload_refused", why=str(error), url=shown(url))
                raise StorageError("the tenant's store has a forbidden address") from error
            except (_RefusedError, aiohttp.ClientError, TimeoutError, OSError) as error:
                why = str(error) if isinstance(error, _RefusedError) else type(error).__name__
                log.warning("tenant_upload_failed", why=why, left=left, url=shown(url))
                if not left:
                    raise StorageError("the tenant's store does not take the file") from error
                pause = FIRST_PAUSE_SECONDS * 4 ** (TRIES - 1 - left)
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
            else:
                return

    async def check(self, details: StorageDetails) -> tuple[Violation | None, str]:
        """Stores a small file, reads it by its link and removes it.

        Returns:
            The violation of the wrong setting if the store rejects the file, else None; and a
            warning if the file's link does not return it.
        """
        name = f"img2img-check-{uuid.uuid4()}.txt"
        try:
            await self._try(details, details.upload_url(name), CHECK_TEXT, "text/plain")
        except ForbiddenAddressError:
            message = "endpoint_url must be a public address"
            return Violation("endpoint_url", Reason.FORBIDDEN_ADDRESS, message), ""
        except _RefusedError as error:
            field, why = _TO_BLAME.get(error.code, ("endpoint_url", f"refuses a file: {error}"))
            return Violation(field, Reason.STORE_REFUSED, f"{field} {why}"), ""
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("storage_check_failed", why=type(error).__name__)
            cause = cause_of(error, urlsplit(details.endpoint_url).hostname or "the host")
            message = "endpoint_url does not answer"
            return Violation("endpoint_url", Reason.UNREACHABLE, message, cause), ""
        served = await self._serves(details.file_link(name))
        await self._remove(details, details.upload_url(name))
        return None, "" if served else "public_url does not serve the files"

    def _sendable(self, url: str) -> str:
        """Returns the URL that is signed and sent, with its host in ASCII.

        Raises:
            ForbiddenAddressError: it must not be contacted.
        """
        return str(self._policy.check_url(url))

    async def _serves(self, link: str) -> bool:
        try:
            target = URL(self._sendable(link), encoded=True)
            async with (
                self._policy.open_session(self._resolver) as session,
                session.get(target, allow_redirects=False, timeout=_TIMEOUT) as answer,
            ):
                return answer.status == 200 and await answer.content.read(4096) == CHECK_TEXT
        except (ForbiddenAddressError, aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _remove(self, details: StorageDetails, url: str) -> None:
        """Removes a file if the key has that permission, which no upload needs."""
        try:
            await self._request(details, url, method="DELETE")
        except (ForbiddenAddressError, aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("storage_check_file_not_removed", why=type(error).__name__)

    async def _try(self, details: StorageDetails, url: str, data: bytes, media_type: str) -> None:
        status, code = await self._request(details, url, data, media_type, acl=True)
        if 400 <= status < 500 or status == 501:  # Some stores refuse the ACL.
            status, code = await self._request(details, url, data, media_type)
        if not 200 <= status < 300:
            raise _RefusedError(status, code)

    async def _request(
        self,
        details: StorageDetails,
        url: str,
        data: bytes = b"",
        media_type: str = "",
        *,
        method: str = "PUT",
        acl: bool = False,
    ) -> tuple[int, str]:
        """Sends a signed request. Returns the HTTP status and the store's code for a refusal."""
        # The URL that is signed must be the one that is sent.
        target = URL(self._sendable(url), encoded=True)
        more = {"Content-Type": media_type} if media_type else {}
        if acl:
            more["x-amz-acl"] = "public-read"
        headers = _signed(details, method, target, data, more)
        async with (
            self._policy.open_session(self._resolver) as session,
            session.request(
                method, target, data=data, headers=headers, allow_redirects=False, timeout=_TIMEOUT
            ) as answer,
        ):
            found = _CODE.search(await answer.content.read(_ANSWER_BYTES))
            return answer.status, found[1].decode() if found else ""


def _signed(
    details: StorageDetails, method: str, url: URL, data: bytes, more: dict[str, str]
) -> dict[str, str]:
    """Returns the headers `more` and the headers that sign the request."""
    date = datetime.now(UTC)
    digest = hashlib.sha256(data).hexdigest()
    signed = sign_v4_s3(
        method=method,
        url=urlsplit(str(url)),
        region=details.region_name,
        headers={
            "Host": str(url.host_port_subcomponent),
            "x-amz-content-sha256": digest,
            "x-amz-date": date.strftime("%Y%m%dT%H%M%SZ"),
            **more,
        },
        credentials=Credentials(details.aws_access_key_id, details.aws_secret_access_key),
        content_sha256=digest,
        date=date,
    )
    return {name: str(value) for name, value in signed.items()}
