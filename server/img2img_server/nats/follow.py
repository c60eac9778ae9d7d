"""Follows event logs: one reader of NATS for each job, and any number of watchers of it.

NATS sends a notice without data for every stored event of a job that is watched here (the stream
republishes headers). The tail of the job then reads the new events once, and keeps the newest ones
for all watchers. A watcher that is too slow for them reads the log itself, from its own position.
So nothing is sent that was not asked for, and a slow watcher costs no memory but that of the event
that it is sending. No consumer is created.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Self

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from img2img_server.domain.events import Envelope, Preview
from img2img_server.errors import UnavailableError
from img2img_server.nats import codec, subjects
from img2img_server.nats.byte_shares import ByteShares
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.direct import DirectReader, Page
from img2img_server.nats.faults import DOWN, unavailable
from img2img_server.nats.turns import Turns
from img2img_server.telemetry import EVENT_BYTES, EVENT_REREADS

RETRY_SECONDS: Final = 1.0
# A tail that waits for a notice also looks for new events, because a notice can be lost: soon after
# the last event, then less often.
FIRST_LOOK_SECONDS: Final = 0.5
LAST_LOOK_SECONDS: Final = 5.0
LAG_SECONDS: Final = 0.01  # until a replica is read again that lacks an event of a notice
PAGE_BYTES: Final = 256 * 1024  # a page of a tail ends with the event that reaches this size
PAGE_EVENTS: Final = 256
SLOW_PAGE_BYTES: Final = 32 * 1024  # the same for a watcher that reads the log itself
SLOW_PAGE_EVENTS: Final = 64
KEPT_BYTES: Final = 32 * 2**20  # newest events of all tails together
SENDING_BYTES: Final = 96 * 2**20  # events that watchers are sending, shared by tenant
SMALL_BYTES: Final = 16 * 1024  # an event up to this size is not counted in SENDING_BYTES
STREAMS_AT_ONCE: Final = 32  # watchers that continue in one iteration of the event loop

_KEPT: Final = EVENT_BYTES.labels("kept")
_SENDING: Final = EVENT_BYTES.labels("sending")

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Entry:
    """An event of the log. `envelope`: None if this version does not know the event. `error`: why
    it cannot be decoded.
    """

    position: int
    size: int
    envelope: Envelope | None = None
    error: codec.UndecodableError | None = None


def _entries(page: Page) -> list[_Entry]:
    found = []
    for message in page.messages:
        entry = _Entry(message.position, len(message.data))
        try:
            entry.envelope = codec.decode_event(message.data)
        except codec.UndecodableError as error:
            entry.error = error
        found.append(entry)
    return found


class LogFollowers:
    """All tails and watchers of one connection, and the memory that they share."""

    def __init__(self, link: NatsConnection) -> None:
        self.link = link
        self.reader = DirectReader(link, subjects.EVENTS)
        self.sending = ByteShares(SENDING_BYTES)
        self.turns = Turns(STREAMS_AT_ONCE)
        self._tails: dict[int, _Tail] = {}
        self._kept: dict[_Entry, _Tail] = {}  # the oldest first
        self._kept_bytes = 0
        link.interrupt_at_reconnect(self)

    @asynccontextmanager
    async def watching(
        self, job_id: int, after_sequence: int, tenant: str
    ) -> AsyncIterator[LogWatcher]:
        """Yields an iterator over the events after `after_sequence`. Raises UnavailableError."""
        await self.link.ready()
        tail = self._tails.get(job_id)
        if tail is None:
            tail = self._tails[job_id] = _Tail(self, job_id)
        tail.watchers += 1
        watcher = LogWatcher(self, tail, after_sequence, tenant)
        try:
            await tail.open()
            yield watcher
        finally:
            watcher.stop()
            tail.watchers -= 1
            if not tail.watchers and self._tails.get(job_id) is tail:
                del self._tails[job_id]
                await tail.close()

    def keep(self, tail: _Tail, entry: _Entry) -> None:
        """Keeps an event for the watchers of the tail, and drops the oldest events of all tails
        beyond KEPT_BYTES."""
        self._kept[entry] = tail
        self._count(entry.size)
        while self._kept_bytes > KEPT_BYTES:
            oldest = next(iter(self._kept))
            self._kept[oldest].drop_until(oldest)

    def dropped(self, entry: _Entry) -> None:
        """Forgets an event that its tail has dropped."""
        del self._kept[entry]
        self._count(-entry.size)

    def _count(self, change: int) -> None:
        self._kept_bytes += change
        _KEPT.set(self._kept_bytes)

    def interrupt(self) -> None:
        """Makes every tail read again: notices may be lost while the connection was."""
        self.reader.interrupt()
        for tail in self._tails.values():
            tail.read_again()


class _Tail:
    """The newest events of one job's log.

    `entries` has every event at positions above `low` and up to `high`, except previews that newer
    ones have replaced.
    """

    def __init__(self, followers: LogFollowers, job_id: int) -> None:
        self._followers = followers
        self._subject = subjects.events_filter(job_id)
        self.job_id = job_id
        self._noticed = 0  # position of the newest event that a notice named
        self._may_have_more = True  # the log may have events after `high` without a notice
        self._changed = asyncio.Event()
        self._subscription: Subscription | None = None
        self._opening: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: list[asyncio.Future[None]] = []
        self.entries: list[_Entry] = []
        self.low = self.high = 0
        self.watchers = 0

    async def open(self) -> None:
        """Subscribes to notices, once for all watchers. Raises UnavailableError."""
        if self._opening is None or (self._opening.done() and self._opening.exception()):
            self._opening = asyncio.ensure_future(self._open())
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        with unavailable():
            self._subscription = await self._followers.link.nc.subscribe(
                subjects.notices_filter(self.job_id), cb=self._notice
            )
        self._reading = asyncio.create_task(self._read())
        self._reading.add_done_callback(self._stopped)

    def _stopped(self, reading: asyncio.Task[None]) -> None:
        """Hands an unexpected error of the reading task to the watchers."""
        if not reading.cancelled() and (error := reading.exception()):
            for future in self._waiting:
                if not future.done():
                    future.set_exception(error)

    async def close(self) -> None:
        """Unsubscribes and drops the events."""
        if self._opening:
            with suppress(UnavailableError):
                await asyncio.shield(self._opening)
        if self._reading:
            self._reading.cancel()
        if self.entries:
            self.drop_until(self.entries[-1])
        if self._subscription:
            with suppress(*DOWN, nats.errors.Error):
                await self._subscription.unsubscribe()

    async def _notice(self, msg: Msg) -> None:
        headers = msg.headers or {}
        self._noticed = max(self._noticed, int(headers.get("Nats-Sequence", "0")))
        self._changed.set()

    def read_again(self) -> None:
        """Makes the tail read the log without a notice."""
        self._may_have_more = True
        self._changed.set()

    async def more(self, position: int) -> _Entry | None:
        """Waits for an event after `position` and for a turn to send it. None: look again."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if len(self._waiting) == 1:
            self._changed.set()
        try:
            await future
        finally:
            if future.cancelled() and future in self._waiting:
                self._waiting.remove(future)
        return self.after(position) if position >= self.low else None

    def after(self, position: int) -> _Entry | None:
        """Returns the first kept event after `position`, at least `low`; None if there is none."""
        index = bisect_right(self.entries, position, key=lambda entry: entry.position)
        return self.entries[index] if index < len(self.entries) else None

    def start_of(self, after_sequence: int) -> int:
        """Returns the position to start at for the events after `after_sequence`."""
        for entry in self.entries:
            if entry.envelope is not None:
                return self.low if entry.envelope.sequence <= after_sequence + 1 else 0
        return 0

    async def _read(self) -> None:
        """Reads new events while watchers wait for them."""
        pause, lag = FIRST_LOOK_SECONDS, LAG_SECONDS
        while True:
            self._changed.clear()
            if not self._waiting:
                await self._changed.wait()
            elif self._may_have_more or self._noticed > self.high:
                self._may_have_more = False
                page = await self._page()
                if page.messages:
                    pause, lag = FIRST_LOOK_SECONDS, LAG_SECONDS
                    self._may_have_more |= not page.is_last
                    self._add(_entries(page))
                elif self._noticed > self.high:
                    await asyncio.sleep(lag)
                    lag *= 2
                    if lag > RETRY_SECONDS:  # The log was removed.
                        self._noticed = self.high
            else:
                try:
                    async with asyncio.timeout(pause):
                        await self._changed.wait()
                except TimeoutError:
                    self._may_have_more = True
                    pause = min(LAST_LOOK_SECONDS, 2 * pause)

    async def _page(self) -> Page:
        while True:
            try:
                return await self._followers.reader.page(
                    self._subject, self.high + 1, most=PAGE_EVENTS, most_bytes=PAGE_BYTES
                )
            except (UnavailableError, nats.js.errors.APIError) as error:
                log.debug("log_not_readable: %s: %r", self._subject, error)
                await asyncio.sleep(RETRY_SECONDS)

    def _add(self, entries: list[_Entry]) -> None:
        for entry in entries:
            self._drop_replaced(entry)
            self.entries.append(entry)
            self.high = entry.position
            self._followers.keep(self, entry)
        waiting, self._waiting = self._waiting, []
        self._followers.turns.extend(waiting)

    def _drop_replaced(self, entry: _Entry) -> None:
        """Drops the preview that the log no longer has."""
        if entry.envelope is None or not isinstance(preview := entry.envelope.event, Preview):
            return
        for index, old in enumerate(self.entries):
            event = old.envelope.event if old.envelope else None
            if isinstance(event, Preview) and event.sample == preview.sample:
                del self.entries[index]
                self._followers.dropped(old)
                return

    def drop_until(self, last: _Entry) -> None:
        """Drops the kept events up to this one."""
        count = self.entries.index(last) + 1
        for entry in self.entries[:count]:
            self._followers.dropped(entry)
        del self.entries[:count]
        self.low = max(self.low, last.position)


class LogWatcher:
    """Iterates over the events of one log for one caller; never ends.

    An event counts as being sent until the next one is asked for.
    """

    def __init__(
        self, followers: LogFollowers, tail: _Tail, after_sequence: int, tenant: str
    ) -> None:
        self._followers = followers
        self._tail = tail
        self._tenant = tenant
        self._last_sequence = after_sequence
        self._position = tail.start_of(after_sequence)
        self._page: deque[_Entry] = deque()
        self._held = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope:
        """Returns the next event. Can be called again after a call that was cancelled."""
        self._release()
        while True:
            entry = await self._next()
            if entry.size > SMALL_BYTES and not self._try_hold(entry.size):
                size = entry.size
                # The event is not held while others send.
                self._page.clear()
                del entry
                await self._followers.sending.hold(self._tenant, size)
                self._held = size
                entry = await self._next()
                self._followers.sending.adjust(self._tenant, entry.size - size)
                self._held = entry.size
            self._position = entry.position
            if self._page and self._page[0] is entry:
                self._page.popleft()
            if entry.error:
                raise entry.error
            envelope = entry.envelope
            if envelope is not None and envelope.sequence > self._last_sequence:
                self._last_sequence = envelope.sequence
                return envelope
            self._release()

    async def _next(self) -> _Entry:
        """Waits for the event after the position and a turn to send it. Leaves the position."""
        while True:
            if self._page:
                await self._followers.turns.turn()
                return self._page[0]
            if self._position < self._tail.low:
                await self._read()
            elif entry := self._tail.after(self._position):
                await self._followers.turns.turn()
                return entry
            elif entry := await self._tail.more(self._position):
                return entry

    async def _read(self) -> None:
        """Reads events that the tail no longer keeps."""
        EVENT_REREADS.inc()
        subject, start = subjects.events_filter(self._tail.job_id), self._position + 1
        try:
            page = await self._followers.reader.page(
                subject, start, most=SLOW_PAGE_EVENTS, most_bytes=SLOW_PAGE_BYTES
            )
            self._page.extend(_entries(page))
            if not page.messages:
                # Either the events were removed, or the replica that was read lags behind.
                first = await self._followers.link.next_sequence(subjects.EVENTS, subject, start)
                if first is None or first > self._tail.low:
                    self._position = self._tail.low
                else:
                    await asyncio.sleep(LAG_SECONDS)
        except (UnavailableError, nats.js.errors.APIError) as error:
            log.debug("log_not_readable: %s: %r", subject, error)
            await asyncio.sleep(RETRY_SECONDS)

    def _try_hold(self, size: int) -> bool:
        if self._followers.sending.try_hold(self._tenant, size):
            self._held = size
            _SENDING.set(self._followers.sending.held)
            return True
        return False

    def _release(self) -> None:
        held, self._held = self._held, 0
        if held:
            self._followers.sending.release(self._tenant, held)
            _SENDING.set(self._followers.sending.held)

    def stop(self) -> None:
        """Releases what the watcher holds."""
        self._page.clear()
        self._release()
