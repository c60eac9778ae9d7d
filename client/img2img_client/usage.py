"""Checks where a client is used: in which process and in which event loop.

gRPC's own errors for these mistakes name none of both, or a call just never returns.
"""

from __future__ import annotations

import asyncio
import os

from img2img_client import errors

FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"

# The process that used gRPC first, which a forked process inherits. None: no process has used it.
_first_process: int | None = None


def check_fork() -> None:
    """Records the first process that uses gRPC.

    Raises:
        ClientUsageError: this process was forked from it without gRPC's fork support, so that calls
            would never return.
    """
    global _first_process
    if _first_process is None:
        _first_process = os.getpid()
    is_forked = _first_process != os.getpid()
    if is_forked and os.environ.get(FORK_VARIABLE, "").lower() in ("0", "false", "no", "off"):
        raise errors.ClientUsageError(errors.FORK_NOT_SUPPORTED)


class Process:
    """The process that opened a stream or a client."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """Whether this process opened it, and not the one from which it was forked."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises ClientUsageError in a forked process."""
        if not self.is_this:
            raise errors.ClientUsageError(errors.OTHER_PROCESS)


class Loop:
    """The event loop of an asyncio client: that of its channel, or the first one that uses it."""

    def __init__(self, channel: object | None) -> None:
        self._loop: asyncio.AbstractEventLoop | None = getattr(channel, "_loop", None)

    @property
    def is_closed(self) -> bool:
        """Whether the event loop has been closed, so that nothing of it can be awaited."""
        return self._loop is not None and self._loop.is_closed()

    def check(self) -> None:
        """Raises ClientUsageError outside the event loop of the client."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError as error:
            raise errors.ClientUsageError(errors.NO_EVENT_LOOP) from error
        if self._loop is None:
            self._loop = running
        if self._loop is not running:
            raise errors.ClientUsageError(errors.OTHER_EVENT_LOOP)
