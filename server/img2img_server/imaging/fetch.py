"""Downloads init images from addresses that callers supply."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver
from yarl import URL

from img2img_server.domain.params import Limits
from img2img_server.imaging.base import FetchError, too_large
from img2img_server.imaging.codings import (
    CodingError,
    DecodedTooLargeError,
    content_codings,
    decode,
)
from img2img_server.outbound.causes import cause_of
from img2img_server.outbound.policy import (
    ForbiddenAddressError,
    OutboundPolicy,
    shown,
)
from img2img_server.outbound.reading import OverheadExceededError, ReadBudget
from img2img_server.outbound.retry_after import seconds_of

log = structlog.get_logger(__name__)

MAX_REDIRECTS: Final = 3
REDIRECTS: Final = (301, 302, 303, 307, 308)
MAX_RETRIES: Final = 2  # of one download with all its redirects
RETRIED_STATUSES: Final = (429, 500, 502, 503, 504)
FIRST_PAUSE_SECONDS: Final = 0.2
# These errors are permanent: names and certificates rarely change.
_PERMANENT_ERRORS: Final = (
    aiohttp.ClientSSLError,
    aiohttp.ClientConnectorDNSError,
    OverheadExceededError,
    ValueError,
)
HEADERS: Final = {"Accept": "image/png, image/jpeg, image/webp, */*;q=0.1"}


def _report_nothing(_: int) -> None:
    """Ignores the received bytes."""


class _AttemptFailedError(Exception):
    """A request returned no image; the message is a clause for the caller.

    Attributes:
        transient: The same request may succeed a moment later.
        retry_after_seconds: The pause that the server asked for.
    """

    def __init__(
        self, cause: str, *, transient: bool = False, retry_after_seconds: float = 0.0
    ) -> None:
        super().__init__(cause)
        self.transient = transient
        self.retry_after_seconds = retry_after_seconds


@dataclass(slots=True)
class _Progress:
    """The progress of a download, for the message of a timeout or a broken connection."""

    url: URL | None = None
    redirects: int = 0
    retries: int = 0
    report: Callable[[int], None] = _report_nothing
    answered: bool = False  # whether the response headers of the current request have arrived
    received: int = 0  # received bytes of its body
    budget: ReadBudget = field(default_factory=ReadBudget)  # of all requests together

    @property
    def host(self) -> str:
        """The host in messages to the caller, who must not see the host of a redirect."""
        named = self.url.raw_host if self.url and not self.redirects else None
        return named or "the host of a redirect"

    def explained(self, cause: str) -> str:
        if self.redirects and "redirect" not in cause:
            return f"{cause} (after a redirect)"
        return cause


async def fetch_image(
    url: str,
    report: Callable[[int], None] = _report_nothing,
    *,
    policy: OutboundPolicy,
    limits: Limits,
    timeout_seconds: float = 10.0,
    resolver: AbstractResolver | None = None,
) -> bytes:
    """Downloads the file at an address; `check_image` checks whether it is an image.

    Transient failures (a status of RETRIED_STATUSES, a broken connection) are retried up to
    MAX_RETRIES times.

    Args:
        timeout_seconds: The limit from resolving the first name to the last byte.
        resolver: Resolves names; DNS by default.
        report: Is called with the received bytes as they grow. Its errors end the download.

    Raises:
        FetchError: The address is forbidden, or the download fails.
        InvalidImageError: The file is larger than limits.max_image_bytes.
    """
    progress = _Progress(report=report)
    ends = time.monotonic() + timeout_seconds
    try:
        async with (
            asyncio.timeout(timeout_seconds),
            policy.open_session(resolver, progress.budget) as session,
        ):
            data = await _download(session, policy, url, limits, progress, ends)
        if progress.retries:
            log.info("init_image_fetched_after_retries", retries=progress.retries, url=shown(url))
        return data
    except (ForbiddenAddressError, _AttemptFailedError, CodingError, TimeoutError) as error:
        timed_out = isinstance(error, TimeoutError)
        reason = _too_slow(progress, timeout_seconds) if timed_out else str(error)
        log.info("init_image_not_fetched", reason=reason, retries=progress.retries, url=shown(url))
        cause = error.cause if isinstance(error, ForbiddenAddressError) else reason
        raise FetchError(progress.explained(cause)) from error


def _too_slow(progress: _Progress, timeout_seconds: float) -> str:
    if progress.answered:
        read = f"{progress.received} bytes had arrived"
        return f"the server did not send the whole image within {timeout_seconds:g} s; {read}"
    return f"the server did not answer within {timeout_seconds:g} s"


async def _download(
    session: aiohttp.ClientSession,
    policy: OutboundPolicy,
    text: str,
    limits: Limits,
    progress: _Progress,
    ends: float,
) -> bytes:
    progress.url = policy.check_url(text)
    while True:
        try:
            answer = await _request(session, progress, limits)
        except _AttemptFailedError as failed:
            pause = FIRST_PAUSE_SECONDS * 3**progress.retries * random.uniform(0.8, 1.2)  # noqa: S311
            pause = max(pause, failed.retry_after_seconds)
            is_last = progress.retries == MAX_RETRIES or time.monotonic() + pause >= ends
            if is_last or not failed.transient:
                raise
            progress.retries += 1
            await asyncio.sleep(pause)
            continue
        if isinstance(answer, bytes):
            return answer
        if progress.redirects == MAX_REDIRECTS:
            raise _AttemptFailedError(f"too many redirects, more than {MAX_REDIRECTS}")
        progress.redirects += 1
        progress.url = policy.check_url(answer, base=progress.url)


async def _request(
    session: aiohttp.ClientSession, progress: _Progress, limits: Limits
) -> bytes | str:
    """Makes one request; returns the file, or the location of a redirect.

    Raises _AttemptFailedError, ForbiddenAddressError, CodingError.
    """
    progress.answered, progress.received = False, 0
    assert progress.url is not None
    try:
        async with session.get(progress.url, headers=HEADERS, allow_redirects=False) as response:
            progress.answered = True
            if response.status not in REDIRECTS:
                return await _body(response, limits, progress)
            location = response.headers.get("Location", "").strip()
            if not location:
                raise _AttemptFailedError(
                    f"the server answered {response.status} without a Location"
                )
            return location
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if type(error) is TimeoutError:  # The timeout of the whole download has expired.
            raise
        if progress.budget.exceeded:
            error = OverheadExceededError()
        cause = cause_of(error, progress.host)
        if progress.answered and isinstance(error, aiohttp.ClientPayloadError | OSError):
            cause = f"the connection broke after {progress.received} bytes"
        raise _AttemptFailedError(
            cause, transient=not isinstance(error, _PERMANENT_ERRORS)
        ) from error


async def _body(response: aiohttp.ClientResponse, limits: Limits, progress: _Progress) -> bytes:
    if response.status != 200:
        transient = response.status in RETRIED_STATUSES
        asked = response.headers.get("Retry-After", "") if transient else ""
        raise _AttemptFailedError(
            f"the server answered {response.status}",
            transient=transient,
            retry_after_seconds=seconds_of(asked, time.time()),
        )
    if (response.content_length or 0) > limits.max_image_bytes:
        raise too_large(limits)
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        progress.budget.add_content(len(chunk))
        progress.received = len(body)
        if len(body) > limits.max_image_bytes:
            raise too_large(limits)
        progress.report(len(body))
    codings = content_codings(response.headers.getall("Content-Encoding", ()))
    if not codings:
        return bytes(body)
    try:
        return await asyncio.to_thread(decode, bytes(body), codings, limits.max_image_bytes)
    except DecodedTooLargeError:
        raise too_large(limits) from None
