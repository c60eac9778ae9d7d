"""Tests whether NATS stores messages, and compares its clock with that of this machine."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from datetime import UTC
from typing import Final

import nats.js.errors

from img2img_server import clock
from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import DOWN

PROBE_SECONDS: Final = 2.0
# NATS reports a failed write in its own log only. The publisher gets no response.
STORES_NOTHING: Final = (
    "IMG2IMG_NATS_URL: NATS responds, but stores nothing. If its disk was full, make room and "
    "restart nats-server: it does not write to a stream again after a failed write"
)

log = logging.getLogger(__name__)


class Probe:
    """Stores a small message, which expires by itself, each time it is called.

    `trouble` is why NATS stores nothing; empty while it does.
    """

    def __init__(self, link: NatsConnection) -> None:
        self._link = link
        self._subject = subjects.key_subject(subjects.RATES_BUCKET, f"_probe.{uuid.uuid4().hex}")
        self.trouble = ""

    async def __call__(self) -> None:
        reason = await self._failure()
        if reason and reason != self.trouble:
            log.warning("nats_not_writable: %s", reason)
        elif self.trouble and not reason:
            log.warning("nats_writable_again")
        self.trouble = reason

    async def _failure(self) -> str:
        """Returns why a message cannot be stored; empty if it was stored."""
        asked = time.monotonic()
        try:
            stored = await self._link.js.publish(self._subject, b"", timeout=PROBE_SECONDS)
        except DOWN as error:
            return await self._reason(error)
        except nats.js.errors.APIError as error:  # for example, the limit of its storage
            return f"IMG2IMG_NATS_URL: NATS stores nothing: {error.description}"
        answered = time.monotonic()
        await self._compare(stored.seq, asked, answered)
        return ""

    async def _reason(self, error: Exception) -> str:
        """Returns why a write got no response."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._link.js.stream_info(subjects.bucket_stream(subjects.RATES_BUCKET))
        except (*DOWN, nats.js.errors.APIError):
            return self._link.trouble or "IMG2IMG_NATS_URL: NATS does not respond"
        if isinstance(error, nats.js.errors.ServiceUnavailableError):
            return f"IMG2IMG_NATS_URL: NATS stores nothing: {error.description}"
        return STORES_NOTHING

    async def _compare(self, sequence: int, asked: float, answered: float) -> None:
        """Compares the clocks by the time at which NATS stored a message."""
        stream = subjects.bucket_stream(subjects.RATES_BUCKET)
        try:
            msg = await self._link.js.get_msg(stream, sequence)
        except (*DOWN, nats.js.errors.APIError):  # The next call compares them.
            return
        if msg.time is not None:
            clock.CLOCK.observe(msg.time.replace(tzinfo=UTC).timestamp(), asked, answered)
