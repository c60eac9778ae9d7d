"""A connection to NATS that reconnects by itself and reports at once while it is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol, TypeVar
from urllib.parse import urlsplit
from weakref import WeakSet

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.errors import SlowConsumerError
from nats.js import JetStreamContext
from nats.js.api import PubAck, RawStreamMsg

from img2img_server.errors import UnavailableError
from img2img_server.lifecycle import first_of, unless_stopped
from img2img_server.nats import faults
from img2img_server.nats.access import NatsAccess
from img2img_server.nats.faults import ConnectFault, WrongLastSequenceError, unavailable
from img2img_server.nats.inbox import Interrupted, ReplyInbox
from img2img_server.nats.patched_client import DENIED, PatchedClient
from img2img_server.settings import SettingsError
from img2img_server.telemetry import NATS_CALLS, NATS_RECONNECTS

REQUEST_SECONDS: Final = 4.0  # seconds; longest wait for a response
RECONNECT_WAIT_SECONDS: Final = 2.0  # seconds; how long a call waits for a lost connection
RECONNECT_SECONDS: Final = 0.2  # seconds between two attempts to reconnect
CONNECT_SECONDS: Final = 10.0  # seconds; default of the longest wait for the first connection
REPORT_SECONDS: Final = 5.0  # seconds until the same reason is logged again
# A stream whose leader died has a new one within 4 to 9 s (the election timeouts of NATS).
ELECTION_SECONDS: Final = 12.0
ELECTION_PAUSE_SECONDS: Final = 0.25
NO_RESPONDERS: Final = "503"
# status codes: the last message was sent; there is no message
_END_OF_BATCH: Final = ("204", "404")
PENDING_BYTES: Final = 16 * 2**20  # most bytes that wait to be sent

T = TypeVar("T")

log = logging.getLogger(__name__)


class Interruptible(Protocol):
    """A reader that must ask again after a reconnect."""

    def interrupt(self) -> None: ...


class NatsConnection:
    """A connection that reconnects when it is lost. Created by `connect`."""

    def __init__(self, access: NatsAccess, reconnect_wait_seconds: float) -> None:
        self._access = access
        self._reconnect_wait_seconds = reconnect_wait_seconds
        self.nc = PatchedClient(needs_tls=access.needs_tls)
        self.js: JetStreamContext = self.nc.jetstream(timeout=REQUEST_SECONDS)
        self._up = asyncio.Event()
        self._readers: WeakSet[Interruptible] = WeakSet()
        # the faults of the last attempts, by host and port
        self._faults: dict[str, ConnectFault] = {}
        self._reported = ("", 0.0)  # the last reason that was logged, and the time of that log line
        self._hopeless = asyncio.Event()
        self._denied = ""
        self._needed_bytes = 0
        self._is_denied = asyncio.Event()

    async def open(self, name: str, seconds: float) -> None:
        """Connects for the first time; repeats attempts that may succeed later.

        Raises:
            SettingsError: Every server refused in a way that another attempt cannot change.
            UnavailableError: No connection within `seconds`.
        """
        access, login = self._access, self._access.login
        connecting = self.nc.connect(
            list(access.servers),
            name=name,
            user=login.user if login.user or login.password else None,
            password=login.password if login.user or login.password else None,
            token=login.token or None,
            user_credentials=str(access.creds_file) if access.creds_file else None,
            tls=access.tls if access.needs_tls else None,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnect,
            reconnected_cb=self._on_reconnect,
            connect_timeout=2,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_SECONDS,  # type: ignore[arg-type]
            ping_interval=3,  # A server that does not respond is given up after 6 to 9 s.
            pending_size=PENDING_BYTES,
            drain_timeout=3,
        )
        try:
            async with asyncio.timeout(seconds):
                await first_of(connecting, self._hopeless.wait())
        except (*faults.DOWN, nats.errors.Error, ValueError) as error:
            await self.nc.close()
            why = self._why_not() or f"IMG2IMG_NATS_URL: {error}"
            raise UnavailableError(f"{why}; no connection within {seconds:g} s") from error
        if not self.nc.is_connected:
            await self.nc.close()
            raise SettingsError(self._why_not())
        self._up.set()

    def _why_not(self) -> str:
        """Returns the faults of the last attempts to connect, each with its setting; empty without
        faults.
        """
        sentences = (f"{fault.setting}: {fault.sentence}" for fault in self._faults.values())
        return "; ".join(dict.fromkeys(sentences))

    @property
    def trouble(self) -> str:
        """Why there is no connection; empty while there is one."""
        if self.nc.is_connected:
            return ""
        return self._why_not() or "IMG2IMG_NATS_URL: the connection to NATS is lost"

    async def unless_denied(self, work: Awaitable[object]) -> None:
        """Waits for `work`, but not longer than until the server reports a missing permission.

        The server sends no response to a request that it denies, so the request would time out.

        Raises:
            SettingsError: The user lacks a permission.
        """
        await first_of(work, self._is_denied.wait())
        if self._denied:
            raise SettingsError(f"{self._access.source}: {self._denied}")

    async def has_jetstream(self) -> bool:
        """Returns whether a server of the cluster offers JetStream, not only the connected one.

        Raises UnavailableError when no response comes.
        """
        if self.nc.offers_jetstream:
            return True
        with unavailable():
            try:
                await self.nc.request("$JS.API.INFO", timeout=REQUEST_SECONDS)
            except nats.errors.NoRespondersError:
                return False
        return True

    def check_max_payload(self, needed_bytes: int) -> None:
        """Raises SettingsError if the server does not accept messages of that size."""
        self._needed_bytes = needed_bytes
        if why := self._too_small():
            raise SettingsError(why)

    def _too_small(self) -> str:
        if self.nc.max_payload >= self._needed_bytes:
            return ""
        return (
            f"IMG2IMG_NATS_URL: the NATS server at {self.nc.attempted} takes messages of at "
            f"most {self.nc.max_payload} bytes (max_payload), and images need "
            f"{self._needed_bytes}: set `max_payload: {_megabytes(self._needed_bytes)}MB` in the "
            "configuration of the NATS server, or lower IMG2IMG_MAX_SIDE_PIXELS (1024 needs 4MB)"
        )

    async def _on_error(self, error: Exception) -> None:
        if DENIED in str(error).lower():
            said = str(error).removeprefix("nats: ").strip("' ")
            self._denied = f"the NATS server denies the user a permission that it needs ({said})"
            self._is_denied.set()
            log.warning("nats_permission_missing: %s", said)
        elif self.nc.is_connected:
            # Readers of dropped messages notice the gap and read again, so this event is no
            # warning.
            level = logging.DEBUG if isinstance(error, SlowConsumerError) else logging.WARNING
            log.log(level, "NATS error: %r", error)
        else:
            self._note_fault(error)

    def _note_fault(self, error: Exception) -> None:
        if self._hopeless.is_set():
            return
        server = self.nc.attempted
        fault = faults.explain_connect(error, server, self._access.source)
        self._faults[server] = fault
        reason, at = self._reported
        now = time.monotonic()
        if fault.sentence != reason or now - at > REPORT_SECONDS:
            self._reported = (fault.sentence, now)
            log.warning("nats_not_connected: %s: %s", fault.setting, fault.sentence)
        ours = {urlsplit(server).netloc for server in self._access.servers}
        final = {server for server, each in self._faults.items() if each.final}
        if ours <= final and not self._up.is_set():
            self._hopeless.set()

    async def close(self) -> None:
        """Sends the pending messages and closes the connection."""
        with suppress(*faults.DOWN):
            await self.nc.drain()
        await self.nc.close()

    async def _on_disconnect(self) -> None:
        if self._up.is_set() and not self.nc.is_closed:
            log.warning("nats_disconnected")
        self._up.clear()

    async def _on_reconnect(self) -> None:
        NATS_RECONNECTS.inc()
        log.warning("nats_reconnected")
        # the client may have reached another server, or one with another configuration
        if why := self._too_small():
            log.error("nats_max_payload_too_small: %s", why)
        self._faults.clear()
        self._reported = ("", 0.0)
        self._up.set()
        for reader in self._readers:
            reader.interrupt()

    def interrupt_at_reconnect(self, reader: Interruptible) -> None:
        """Calls `reader.interrupt` each time that a lost connection is open again."""
        self._readers.add(reader)

    async def ready(self, seconds: float | None = None) -> None:
        """Waits until the connection is open.

        Nothing is sent while the connection is lost: a request that was reported as failed must not
        be executed later.

        Args:
            seconds: How long to wait; by default reconnect_wait_seconds.

        Raises:
            UnavailableError: The connection is not open in time.
        """
        if self.nc.is_connected:
            return
        if not self.nc.is_closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(
                    self._reconnect_wait_seconds if seconds is None else seconds
                ):
                    await self._up.wait()
                    return
        raise UnavailableError(detail=f"{self.trouble}; no connection")

    async def ask(self, call: Callable[[], Awaitable[T]], *, repeatable: bool = True) -> T:
        """Returns the response of JetStream to `call`.

        Without a leader a stream does nothing, so the call is repeated for as long as an election
        takes.

        Args:
            repeatable: The call may also be repeated when its response was lost.

        Raises:
            UnavailableError: The connection is lost, or no leader was elected.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + ELECTION_SECONDS
        while True:
            await self.ready()
            try:
                with unavailable():
                    answer = await call()
                NATS_CALLS.labels("ok").inc()
                return answer
            except UnavailableError as error:
                NATS_CALLS.labels("failed").inc()
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
            UnavailableError: No response; the message may be stored or not.
            WrongLastSequenceError: The headers expect another last sequence.
            SubjectFullError: The subject has as many messages as its stream allows.
        """
        # With this header, the server stores no duplicate.
        known_once = "Nats-Msg-Id" in (headers or {})
        return await self.ask(
            lambda: self.js.publish(subject, data, headers=headers),
            repeatable=repeatable or known_once,
        )

    async def replace(
        self,
        stream: str,
        subject: str,
        data: bytes,
        last: int,
        headers: dict[str, str] | None = None,
    ) -> int:
        """Stores a message if `last` is the sequence of the subject's last one (0: there is none).

        Returns:
            The sequence of the message, also when the first response was lost.

        Raises:
            UnavailableError: No response; the message may be stored or not.
            WrongLastSequenceError: Another client has written to the subject.
        """
        expected = {"Nats-Expected-Last-Subject-Sequence": str(last), **(headers or {})}
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
        """Sends a request that may arrive twice; returns the response. Raises UnavailableError."""
        return await self.ask(lambda: self.nc.request(subject, data, timeout=REQUEST_SECONDS))

    async def send(self, subject: str, data: bytes, reply: str = "") -> None:
        """Publishes without waiting for a response. Raises UnavailableError."""
        await self.ready()
        with unavailable():
            await self.nc.publish(subject, data, reply=reply)

    async def last(self, stream: str, subject: str) -> RawStreamMsg | None:
        """Returns the last message of a subject (wildcards allowed) from the stream's leader."""
        try:
            return await self.ask(lambda: self.js.get_last_msg(stream, subject))
        except nats.js.errors.NotFoundError:
            return None

    async def next_sequence(self, stream: str, subject: str, start: int) -> int | None:
        """Returns the sequence of the subject's first message from `start` on, from the leader."""
        msg = await self.next(stream, subject, start)
        return msg.seq if msg else None

    async def next(self, stream: str, subject: str, start: int) -> RawStreamMsg | None:
        """Returns the subject's first message from `start` on, from the leader."""
        try:
            return await self.ask(lambda: self.js.get_msg(stream, start, subject, next=True))
        except nats.js.errors.NotFoundError:
            return None

    async def sequences(self, stream: str, subject: str, start: int, most: int) -> list[int]:
        """Returns the sequences of the subject's first messages from `start` on, up to `most`.

        Raises UnavailableError.
        """
        return [sequence for sequence, _ in await self.first(stream, subject, start, most)]

    async def first(
        self, stream: str, subject: str, start: int, most: int
    ) -> list[tuple[int, bytes]]:
        """Returns the sequence and the data of the subject's first messages from `start` on.

        One request reads them all, up to `most`, from any replica of the stream. Raises
        UnavailableError.
        """
        request = json.dumps({"seq": start, "next_by_subj": subject, "batch": most}).encode()

        async def call() -> list[tuple[int, bytes]]:
            inbox = await self.open_inbox()
            found: list[tuple[int, bytes]] = []
            try:
                await self.send(f"$JS.API.DIRECT.GET.{stream}", request, reply=inbox.subject)
                async with asyncio.timeout(REQUEST_SECONDS):
                    while not (status := status_of(msg := await inbox.get())):
                        found.append((int((msg.headers or {})["Nats-Sequence"]), msg.data))
            except Interrupted as error:
                raise TimeoutError from error
            finally:
                await inbox.close()
            if status == NO_RESPONDERS:
                raise nats.errors.NoRespondersError
            if status not in _END_OF_BATCH:
                raise nats.errors.Error(f"{stream} cannot be read: status {status}")
            return found

        return await self.ask(call)

    async def count(self, stream: str, subject: str) -> int:
        """Returns the number of messages under a subject, wildcards allowed.

        Raises UnavailableError.
        """
        info = await self.ask(lambda: self.js.stream_info(stream, subject))
        return sum((info.state.subjects or {}).values())

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
    ) -> ReplyInbox:
        """Subscribes to a private subject until it is closed. Raises UnavailableError."""
        await self.ready()
        inbox = ReplyInbox(self.nc, max_bytes=max_bytes, late=late)
        await inbox.open()
        self.interrupt_at_reconnect(inbox)
        return inbox


def _megabytes(needed_bytes: int) -> int:
    """Returns at least the recommended 8."""
    return max(8, math.ceil(needed_bytes / 1e6))


def status_of(msg: Msg) -> str:
    """Returns three digits for a status message of the server, empty for a stored message."""
    return (msg.headers or {}).get("Status", "")


@asynccontextmanager
async def connect(
    where: NatsAccess | Sequence[str],
    *,
    name: str = "img2img",
    reconnect_wait_seconds: float = RECONNECT_WAIT_SECONDS,
    connect_seconds: float = CONNECT_SECONDS,
    stop: asyncio.Event | None = None,
) -> AsyncIterator[NatsConnection]:
    """Connects to NATS; closes the connection at the end.

    Args:
        where: The servers and credentials, or only URLs as in IMG2IMG_NATS_URL.
        reconnect_wait_seconds: How long a call waits for a lost connection.
        connect_seconds: How long the first connection is attempted.
        stop: Ends these attempts with StoppedError.

    Raises:
        SettingsError: The servers refuse permanently, or a TLS file cannot be used.
        UnavailableError: No connection in time.
    """
    access = where if isinstance(where, NatsAccess) else NatsAccess.of(where)
    link = NatsConnection(access, reconnect_wait_seconds)
    await unless_stopped(stop, link.open(name, connect_seconds))
    try:
        yield link
    finally:
        await link.close()
