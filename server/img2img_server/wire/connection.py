"""One connection to NATS: it comes back by itself, and while it is away callers hear so quickly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar
from weakref import WeakSet

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import PubAck, RawStreamMsg

from img2img_server.errors import UnavailableError
from img2img_server.wire import faults
from img2img_server.wire.faults import WrongLastSequenceError, unavailable
from img2img_server.wire.inbox import Inbox
from img2img_server.wire.resilient_client import ResilientClient

REQUEST_SECONDS: Final = 4.0  # longest wait for an answer of the bus
PATIENCE_SECONDS: Final = 2.0  # how long a call waits for a connection that is away
RECONNECT_SECONDS: Final = 0.2  # between two tries to come back
CONNECT_SECONDS: Final = 10.0  # longest wait for the first connection
# A stream whose leader died has a new one within 4 to 9 s (the election timeouts of NATS).
ELECTION_SECONDS: Final = 12.0
ELECTION_PAUSE_SECONDS: Final = 0.25
PENDING_BYTES: Final = 16 * 2**20  # what may wait to be sent

T = TypeVar("T")

log = logging.getLogger(__name__)


class Link:
    """A connection that stands, or will again. Made by `connect`."""

    def __init__(self, patience_seconds: float) -> None:
        self._patience_seconds = patience_seconds
        self.nc: Client = ResilientClient()
        self.js: JetStreamContext = self.nc.jetstream(timeout=REQUEST_SECONDS)
        self._up = asyncio.Event()
        self._inboxes: WeakSet[Inbox] = WeakSet()

    async def open(self, servers: Sequence[str], creds_file: Path | None, name: str) -> None:
        """Connects for the first time. Raises UnavailableError."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.nc.connect(
                    list(servers),
                    name=name,
                    user_credentials=str(creds_file) if creds_file else None,
                    error_cb=_on_error,
                    disconnected_cb=self._on_disconnect,
                    reconnected_cb=self._on_reconnect,
                    connect_timeout=2,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RECONNECT_SECONDS,  # type: ignore[arg-type]
                    ping_interval=3,  # a server that fell silent is given up after 6 to 9 s
                    pending_size=PENDING_BYTES,
                    drain_timeout=3,
                )
        except (*faults.DOWN, nats.errors.Error) as error:
            shown = ", ".join(server.rpartition("@")[2] for server in servers)  # no passwords
            raise UnavailableError(f"no connection to the bus at {shown}") from error
        self._up.set()

    async def close(self) -> None:
        """Sends what waits to be sent and ends the connection."""
        with suppress(*faults.DOWN):
            await self.nc.drain()
        await self.nc.close()

    async def _on_disconnect(self) -> None:
        if self._up.is_set() and not self.nc.is_closed:
            log.warning("lost the connection to the bus")
        self._up.clear()

    async def _on_reconnect(self) -> None:
        log.warning("the connection to the bus is back")
        self._up.set()
        for inbox in self._inboxes:
            inbox.interrupt()

    async def ready(self) -> None:
        """Waits until the connection stands. Raises UnavailableError when it does not in time.

        Nothing is sent while it is away: what a caller was told had failed must not happen later.
        """
        if self.nc.is_connected:
            return
        if not self.nc.is_closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience_seconds):
                    await self._up.wait()
                    return
        raise UnavailableError

    async def ask(self, call: Callable[[], Awaitable[T]], *, repeatable: bool = True) -> T:
        """The answer of JetStream to `call`, also while streams elect their leaders.

        Nobody leads, nothing was done: it is asked again for as long as an election takes.

        Args:
            repeatable: the call may be made again too when its answer did not come.

        Raises:
            UnavailableError: the connection is away, or nobody came to lead.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + ELECTION_SECONDS
        while True:
            await self.ready()
            try:
                with unavailable():
                    return await call()
            except UnavailableError as error:
                silent = isinstance(error.__cause__, TimeoutError)
                again = (repeatable and silent) or faults.is_leaderless(error.__cause__)
                if not again or loop.time() > until:
                    raise
            await asyncio.sleep(ELECTION_PAUSE_SECONDS)

    async def publish(
        self,
        subject: str,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        repeatable: bool = False,
    ) -> PubAck:
        """Stores a message in its stream. `repeatable`: storing it twice does no harm.

        Raises:
            UnavailableError: no answer; the message may be stored or not.
            WrongLastSequenceError: the headers expect another last sequence.
            SubjectFullError: the subject has its most messages.
        """
        known_once = "Nats-Msg-Id" in (headers or {})  # a second one is not stored
        return await self.ask(
            lambda: self.js.publish(subject, data, headers=headers),
            repeatable=repeatable or known_once,
        )

    async def replace(self, stream: str, subject: str, data: bytes, last: int) -> int:
        """Stores a message if `last` is the sequence of the subject's last one (0: there is none).

        Returns its own sequence; also when its answer was lost and it is asked for again.

        Raises:
            UnavailableError: no answer; the message may be stored or not.
            WrongLastSequenceError: the subject was written by somebody else.
        """
        expected = {"Nats-Expected-Last-Subject-Sequence": str(last)}
        in_doubt = False

        async def call() -> int:
            nonlocal in_doubt
            try:
                return (await self.js.publish(subject, data, headers=expected)).seq
            except TimeoutError:
                in_doubt = True
                raise

        try:
            return await self.ask(call)
        except WrongLastSequenceError:
            there = await self.last(stream, subject) if in_doubt else None
            if there is None or there.data != data:
                raise
            return there.seq or 0

    async def request(self, subject: str, data: bytes = b"") -> Msg:
        """Sends a request that may arrive twice; returns the answer. Raises UnavailableError."""
        return await self.ask(lambda: self.nc.request(subject, data, timeout=REQUEST_SECONDS))

    async def send(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publishes without waiting for an answer. Raises UnavailableError."""
        await self.ready()
        with unavailable():
            await self.nc.publish(subject, data, reply=reply)

    async def last(self, stream: str, subject: str) -> RawStreamMsg | None:
        """The last message of a subject (wildcards allowed), read from the stream's leader."""
        try:
            return await self.ask(lambda: self.js.get_last_msg(stream, subject))
        except nats.js.errors.NotFoundError:
            return None

    async def delete(self, stream: str, sequence: int) -> bool:
        """Deletes one message; False when there is none. Raises UnavailableError."""

        async def call() -> bool:
            try:
                return await self.js.delete_msg(stream, sequence)
            except nats.js.errors.APIError as error:
                if error.err_code in faults.NO_MESSAGE:
                    return False
                raise

        return await self.ask(call)

    async def open_inbox(
        self,
        *,
        max_bytes: int | None = None,
        late: Callable[[Msg], Awaitable[None]] | None = None,
    ) -> Inbox:
        """A private subject that is listened to, until it is closed. Raises UnavailableError."""
        await self.ready()
        inbox = Inbox(self.nc, max_bytes=max_bytes, late=late)
        await inbox.open()
        self._inboxes.add(inbox)
        return inbox


def status_of(msg: Msg) -> str:
    """Three digits when the message is a word of the server's own, empty for a stored message."""
    return (msg.headers or {}).get("Status", "")


async def _on_error(error: Exception) -> None:
    log.debug("bus: %r", error)


@asynccontextmanager
async def connect(
    servers: Sequence[str],
    *,
    creds_file: Path | None = None,
    name: str = "img2img",
    patience_seconds: float = PATIENCE_SECONDS,
) -> AsyncIterator[Link]:
    """A connection to NATS. Raises UnavailableError when none can be made in ten seconds.

    Args:
        patience_seconds: how long a call waits for a connection that is away.
    """
    link = Link(patience_seconds)
    await link.open(servers, creds_file, name)
    try:
        yield link
    finally:
        await link.close()
