"""Makes one attempt at a webhook: a POST under the outbound policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from img2img_server.outbound.causes import cause_of
from img2img_server.outbound.policy import ForbiddenAddressError, OutboundPolicy
from img2img_server.outbound.retry_after import seconds_of

TIMEOUT_SECONDS = 30.0
_GONE = 410
_ASKS_FOR_TIME = (429, 503)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an attempt.

    `final`: no further attempt is made. `retry_after_seconds`: the delay that the receiver asked
    for. `reason`: a clause for the caller, without IP addresses. `detail`: a text for the log, if
    it says more than the reason.
    """

    delivered: bool
    final: bool = False
    retry_after_seconds: float = 0.0
    reason: str = ""
    detail: str = ""


# Posts a body with headers to an address; errors of the receiver are outcomes, not exceptions.
WebhookSender = Callable[[str, bytes, Mapping[str, str]], Awaitable[Outcome]]


def webhook_sender(
    policy: OutboundPolicy,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    resolver: AbstractResolver | None = None,
) -> WebhookSender:
    """Returns a sender that connects only to allowed addresses and follows no redirect.

    Each attempt has a connection of its own: a receiver cannot send more than one attempt may read.

    Args:
        timeout_seconds: from resolving the name to the headers of the response, whose body is not
            read.
        resolver: resolves names; DNS by default.
    """

    async def post(address: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        host = ""
        try:
            url = policy.check_url(address)
            host = url.raw_host or ""
            if url.scheme == "http" and not policy.lists(url):
                cause = "the address is http and the operator does not list its host"
                raise ForbiddenAddressError(cause)
            async with (
                asyncio.timeout(timeout_seconds),
                policy.open_session(resolver) as session,
            ):
                return await _post(session, url, body, headers)
        except TimeoutError:
            reason = f"the server did not answer within {timeout_seconds:g} s"
            return Outcome(delivered=False, reason=reason)
        except (ForbiddenAddressError, OSError, ValueError, aiohttp.ClientError) as error:
            forbidden = isinstance(error, ForbiddenAddressError)
            return Outcome(
                delivered=False,
                reason=cause_of(error, host),
                detail=str(error) if forbidden else type(error).__name__,
            )

    return post


async def _post(
    session: aiohttp.ClientSession,
    url: URL,
    body: bytes,
    headers: Mapping[str, str],
) -> Outcome:
    sent = {"Content-Type": "application/json", **headers}
    async with session.post(url, data=body, headers=sent, allow_redirects=False) as response:
        status = response.status
        asked = response.headers.get("Retry-After", "") if status in _ASKS_FOR_TIME else ""
        note = "; redirects are not followed" if 300 <= status < 400 else ""
        return Outcome(
            delivered=200 <= status < 300,
            final=status == _GONE,
            retry_after_seconds=seconds_of(asked, time.time()),
            reason=f"the server answered {status}{note}",
        )
