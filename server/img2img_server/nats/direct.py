"""Reads messages of a stream page by page, with batched direct gets and without a consumer."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg

from img2img_server.nats.connection import NO_RESPONDERS, NatsConnection, status_of
from img2img_server.nats.faults import unavailable

AT_ONCE: Final = 4  # pages that are read at a time; bounds the bytes that NATS sends unasked
PAGE_SECONDS: Final = 4.0  # longest wait for the messages of a page
# The cluster also sends requests to a frozen replica, until it notices that. After a request
# without any reply within REPLY_SECONDS, only the leader is asked, for LEADER_SECONDS.
REPLY_SECONDS: Final = 0.5
LEADER_SECONDS: Final = 10.0
# status codes: the last message was sent; there is no message
_END_OF_PAGE: Final = ("204", "404")


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message of a stream. `position`: its sequence in the stream."""

    position: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Page:
    """Messages in the order of the stream. `is_last`: the stream has no later ones yet."""

    messages: list[StoredMessage]
    is_last: bool


class _NoReplyError(Exception):
    """The replica that got the request sent nothing."""


class DirectReader:
    """Reads pages of one stream. Any replica of the stream can answer, so a page can lag behind.

    All replies arrive at one subscription. A page is requested only when its reader can take it, so
    NATS never holds more for this process than AT_ONCE pages.
    """

    def __init__(self, link: NatsConnection, stream: str) -> None:
        self._link = link
        self._stream = stream
        self._gate = asyncio.Semaphore(AT_ONCE)
        self._opening = asyncio.Lock()
        self._inbox = ""
        self._numbers = itertools.count(1)
        self._replies: dict[str, asyncio.Queue[Msg | None]] = {}
        self._direct_from = 0.0  # event loop time from which the replicas are asked

    async def page(self, subject: str, start: int, *, most: int, most_bytes: int) -> Page:
        """Returns the subject's first messages from the position `start` on.

        Args:
            subject: Wildcards are allowed.
            most: Most messages.
            most_bytes: The page ends with the message that reaches this size.

        Raises:
            UnavailableError: No reply, or not all of it.
        """
        await self._link.ready()
        async with self._gate:
            with unavailable():
                return await self._read(subject, start, most, most_bytes)

    async def _read(self, subject: str, start: int, most: int, most_bytes: int) -> Page:
        now = asyncio.get_running_loop().time
        if now() >= self._direct_from:
            request = {
                "seq": start,
                "next_by_subj": subject,
                "batch": most,
                "max_bytes": most_bytes,
            }
            with suppress(_NoReplyError):
                return await self._direct(json.dumps(request).encode())
            self._direct_from = now() + LEADER_SECONDS
        return await self._of_leader(subject, start)

    async def _direct(self, request: bytes) -> Page:
        """Reads a page from one of the replicas.

        Raises:
            _NoReplyError: No message within REPLY_SECONDS.
            TimeoutError: Not all messages.
        """
        await self._open()
        reply = f"{self._inbox}.{next(self._numbers)}"
        queue = self._replies[reply] = asyncio.Queue()
        messages: list[StoredMessage] = []
        try:
            subject = f"$JS.API.DIRECT.GET.{self._stream}"
            await self._link.nc.publish(subject, request, reply=reply)
            try:
                async with asyncio.timeout(REPLY_SECONDS):
                    msg = await queue.get()
            except TimeoutError as error:
                raise _NoReplyError from error
            async with asyncio.timeout(PAGE_SECONDS):
                while msg is not None:
                    headers = msg.headers or {}
                    if status := status_of(msg):
                        return _page(self._stream, messages, status, headers)
                    messages.append(StoredMessage(int(headers["Nats-Sequence"]), msg.data))
                    msg = await queue.get()
        finally:
            del self._replies[reply]
        raise TimeoutError("the connection was lost")

    async def _of_leader(self, subject: str, start: int) -> Page:
        """Reads the first message only, because the leader sends one at a time."""
        try:
            msg = await self._link.js.get_msg(self._stream, start, subject, next=True)
        except nats.js.errors.NotFoundError:
            return Page([], is_last=True)
        return Page([StoredMessage(msg.seq or 0, msg.data or b"")], is_last=False)

    async def _open(self) -> None:
        async with self._opening:
            if not self._inbox:
                inbox = self._link.nc.new_inbox()
                await self._link.nc.subscribe(f"{inbox}.*", cb=self._arrive)
                self._inbox = inbox

    async def _arrive(self, msg: Msg) -> None:
        if queue := self._replies.get(msg.subject):
            queue.put_nowait(msg)

    def interrupt(self) -> None:
        """Ends the reads that wait for a reply of the lost connection."""
        for queue in self._replies.values():
            queue.put_nowait(None)


def _page(stream: str, messages: list[StoredMessage], status: str, headers: dict[str, str]) -> Page:
    if status == NO_RESPONDERS:
        raise nats.errors.NoRespondersError
    if status not in _END_OF_PAGE:
        raise OSError(f"{stream} cannot be read: status {status}")
    return Page(messages, is_last=int(headers.get("Nats-Num-Pending", "0")) == 0)
