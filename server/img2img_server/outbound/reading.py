"""Bounds the cost of reading from a server that a caller chose.

aiohttp parses everything that one read returns, up to 256 KiB, before the event loop gets its next
turn, and it skips any number of interim responses and tiny chunks. A hostile server could keep the
loop busy with them, and no timeout would fire. The sockets here are below TLS and HTTP, so their
limits hold for every protocol: a read returns a small piece, all reads together use half a
millisecond of a turn, and the bytes that are not content are limited.
"""

from __future__ import annotations

import asyncio
import socket
import time
import weakref
from typing import Any, Final

import aiohttp
from typing_extensions import Buffer

# Most bytes of one read, while content arrives and otherwise. 4 KiB of interim responses or tiny
# chunks take 1.5 ms of CPU, 4 KiB of content a hundredth of that.
CONTENT_READ_BYTES: Final = 16 * 1024
READ_BYTES: Final = 4 * 1024
TURN_SECONDS: Final = 0.0005  # seconds of a turn of the loop after which no further read begins
# Most bytes that are not content: status lines, headers, interim responses, framing of chunks and
# of TLS. Large sites send 64 KiB of headers.
OVERHEAD_BYTES: Final = 128 * 1024
# One more byte of overhead is allowed for so many bytes of content.
CONTENT_PER_OVERHEAD: Final = 16


class OverheadExceededError(aiohttp.ClientError):
    """The server sent too many bytes that are not content."""


class ReadBudget:
    """Limits the bytes that servers send during one operation, such as a download with its
    redirects.

    Attributes:
        exceeded: More bytes arrived than allowed. The connection has been closed.
    """

    def __init__(self, overhead_bytes: int = OVERHEAD_BYTES) -> None:
        self._left = overhead_bytes
        self._since_content = 0
        self._receives_content = False
        self.exceeded = False

    @property
    def read_bytes(self) -> int:
        """The most bytes that the next read may return."""
        return CONTENT_READ_BYTES if self._receives_content else READ_BYTES

    def add_content(self, count: int) -> None:
        """Allows further bytes, because so many of the received bytes were content."""
        self._left += count + count // CONTENT_PER_OVERHEAD
        self._receives_content = 2 * count > self._since_content
        self._since_content = 0

    def spend(self, count: int) -> None:
        """Counts received bytes. Raises ConnectionAbortedError if they exceed the budget."""
        self._left -= count
        self._since_content += count
        if self._left < 0:
            self.exceeded = True
            raise ConnectionAbortedError("the server exceeded the budget of this operation")

    def open_socket(self, address: tuple[Any, ...]) -> socket.socket:
        """Opens a socket whose reads count; `socket_factory` of aiohttp's connector."""
        family, kind, protocol, *_ = address
        return _BudgetSocket(self, _Turn.current(), family, kind, protocol)


class _Turn:
    """Shares a turn of the event loop among the reads of all sockets."""

    _of_loops: Final = weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, "_Turn"]()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._ends_at: float | None = None

    @classmethod
    def current(cls) -> _Turn:
        loop = asyncio.get_running_loop()
        return cls._of_loops.setdefault(loop, cls(loop))

    def begin_read(self) -> None:
        """Raises BlockingIOError if the reads of this turn have used up their time.

        The loop then tries again in the next turn, because the socket is still readable.
        """
        now = time.perf_counter()
        if self._ends_at is None:
            self._ends_at = now + TURN_SECONDS
            loop = self._loop()
            assert loop is not None, "its sockets read in the loop"
            loop.call_soon(self._end)  # The loop calls it in the next turn, before it reads.
        elif now > self._ends_at:
            raise BlockingIOError

    def _end(self) -> None:
        self._ends_at = None


class _BudgetSocket(socket.socket):
    """A socket that reads small pieces and counts them."""

    def __init__(self, budget: ReadBudget, turn: _Turn, *address: int) -> None:
        super().__init__(*address)
        self._budget = budget
        self._turn = turn

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        self._turn.begin_read()
        data = super().recv(min(bufsize, self._budget.read_bytes), flags)
        self._budget.spend(len(data))
        return data

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0, /) -> int:
        self._turn.begin_read()
        size = nbytes or memoryview(buffer).nbytes
        count = super().recv_into(buffer, min(size, self._budget.read_bytes), flags)
        self._budget.spend(count)
        return count
