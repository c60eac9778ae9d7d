"""Downloads init images from addresses that callers supply."""

from __future__ import annotations

import asyncio

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver
from yarl import URL

from img2img_server.domain.params import Limits
from img2img_server.images.base import FetchError, too_large
from img2img_server.images.outbound import ForbiddenAddressError, OutboundPolicy, shown

log = structlog.get_logger(__name__)

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"Accept": "image/png, image/jpeg, image/webp, */*;q=0.1"}


class _UnusableAnswerError(Exception):
    """The server answered, but not with a picture."""


async def fetch_image(
    url: str,
    *,
    policy: OutboundPolicy,
    limits: Limits,
    timeout_seconds: float = 10.0,
    resolver: AbstractResolver | None = None,
) -> bytes:
    """Returns what the address serves; check_image says whether it is an image.

    Args:
        timeout_seconds: for everything, from resolving the first name to the last byte.
        resolver: asked for the addresses of names; DNS by default.

    Raises:
        FetchError: forbidden, not found, too slow, too many redirects, encoded or broken off.
        InvalidImageError: more than limits.max_image_bytes.
    """
    try:
        async with asyncio.timeout(timeout_seconds), policy.open_session(resolver) as session:
            return await _download(session, policy, url, limits)
    except (
        ForbiddenAddressError,
        _UnusableAnswerError,
        TimeoutError,
        OSError,
        ValueError,
        aiohttp.ClientError,
    ) as error:
        ours = isinstance(error, ForbiddenAddressError | _UnusableAnswerError)
        reason = str(error) if ours else type(error).__name__
        log.info("init image not fetched", reason=reason, url=shown(url))
        raise FetchError from error


async def _download(
    session: aiohttp.ClientSession, policy: OutboundPolicy, text: str, limits: Limits
) -> bytes:
    target: URL | None = None
    for _ in range(1 + MAX_REDIRECTS):
        target = policy.check_url(text, base=target)
        async with session.get(target, headers=HEADERS, allow_redirects=False) as response:
            if response.status not in REDIRECTS:
                return await _body(response, limits)
            text = response.headers.get("Location", "")
    raise _UnusableAnswerError("too many redirects")


async def _body(response: aiohttp.ClientResponse, limits: Limits) -> bytes:
    if response.status != 200:
        raise _UnusableAnswerError(f"status {response.status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _UnusableAnswerError("encoded although identity was asked for")
    if (response.content_length or 0) > limits.max_image_bytes:
        raise too_large(limits)
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limits.max_image_bytes:
            raise too_large(limits)
    return bytes(body)
