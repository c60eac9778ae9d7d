"""One attempt at a webhook: a POST under the outbound policy, and what its answer means."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp
from aiohttp.abc import AbstractResolver

from img2img_server.images.outbound import ForbiddenAddressError, OutboundPolicy

TIMEOUT_SECONDS = 30.0
_GONE = 410
_ASKS_FOR_TIME = (429, 503)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended.

    `final`: trying again is of no use. `retry_after_seconds`: the receiver asked for this pause.
    `reason`: for the log.
    """

    delivered: bool
    final: bool = False
    retry_after_seconds: float = 0.0
    reason: str = ""


# Posts a body to an address; never raises for the receiver's sake.
Post = Callable[[str, bytes, Mapping[str, str]], Awaitable[Outcome]]


@asynccontextmanager
async def open_post(
    policy: OutboundPolicy,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    resolver: AbstractResolver | None = None,
) -> AsyncIterator[Post]:
    """A Post that connects only to addresses the policy allows, and follows no redirect.

    Args:
        timeout_seconds: from resolving the name to the answer's headers; its body is not read.
        resolver: asked for the addresses of names; DNS by default.
    """
    async with policy.open_session(resolver) as session:

        async def post(address: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
            try:
                async with asyncio.timeout(timeout_seconds):
                    return await _post(session, policy, address, body, headers)
            except ForbiddenAddressError as error:
                return Outcome(delivered=False, reason=str(error))
            except TimeoutError:
                return Outcome(delivered=False, reason="no answer in time")
            except (OSError, ValueError, aiohttp.ClientError) as error:
                return Outcome(delivered=False, reason=type(error).__name__)

        yield post


async def _post(
    session: aiohttp.ClientSession,
    policy: OutboundPolicy,
    address: str,
    body: bytes,
    headers: Mapping[str, str],
) -> Outcome:
    url = policy.check_url(address)
    if url.scheme == "http" and not policy.lists(url):
        raise ForbiddenAddressError("http to a host that is not listed")
    sent = {"Content-Type": "application/json", **headers}
    async with session.post(url, data=body, headers=sent, allow_redirects=False) as response:
        status = response.status
        asked = response.headers.get("Retry-After", "") if status in _ASKS_FOR_TIME else ""
        return Outcome(
            delivered=200 <= status < 300,
            final=status == _GONE,
            retry_after_seconds=seconds_of(asked, time.time()),
            reason=f"status {status}",
        )


def seconds_of(retry_after: str, now: float) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0.0 for anything else.

    Args:
        now: Unix seconds.
    """
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except ValueError:
        return 0.0
