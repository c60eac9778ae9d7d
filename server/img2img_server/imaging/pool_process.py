"""A process that decodes images: `python -m img2img_server.imaging.pool_process`.

It runs one request after the other and ends with its parent. The kernel ends it when a request has
used its CPU time, and refuses it memory beyond what the request was granted.
"""

# ruff: noqa: E402 - rich must be hidden before structlog is imported

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import MutableMapping
from typing import Any, Final

# structlog imports rich where it is installed, which takes 8 MB and is not used here.
sys.modules["rich"] = None  # type: ignore[assignment]

import structlog

from img2img_server.domain import resolve  # noqa: F401 - requests refer to functions of it
from img2img_server.imaging import frames
from img2img_server.imaging.base import InvalidImageError, too_much_memory
from img2img_server.imaging.cost import CPU_UNITS, Cost
from img2img_server.imaging.frames import Buffer
from img2img_server.imaging.prepare import check_image, prepare_image
from img2img_server.malloc import return_large_blocks

_PR_SET_PDEATHSIG: Final = 1
# Memory that a request may use before its image is admitted: small images need no more.
FREE_BYTES: Final = 24 * 2**20
# Copies of the file until its header is read, and memory that the allocator has not given back.
_HEADER_COPIES: Final = 4
_SLACK_BYTES: Final = 48 * 2**20

_notes: list[dict[str, Any]] = []


class _RefusedError(Exception):
    """The parent does not admit the image."""


class _Server:
    def __init__(self, connection: socket.socket, shared: int) -> None:
        self._connection = connection
        self._shared = shared
        self._file_bytes = 0
        self._granted_bytes = 0  # the most that one image may use
        self._needed_bytes = 0
        self._cpu_seconds = 0.0  # for each unit of a cost

    def serve(self) -> None:
        """Answers requests until the parent closes the socket."""
        self._respond("ready")
        while True:
            try:
                head, data = frames.receive(self._connection)
            except (frames.FrameError, OSError):
                return
            self._answer(head, bytes(data))

    def _answer(self, head: bytes, data: bytes) -> None:
        """Runs a request and sends its response."""
        request = pickle.loads(head)  # noqa: S301 - from our parent
        name, arguments, self._granted_bytes, self._cpu_seconds = request
        self._file_bytes = len(data)
        self._limit(Cost(FREE_BYTES, CPU_UNITS))
        try:
            fields, body = _TASKS[name](data, admit=self._admit, **arguments)
            self._respond("done", fields, body)
        except InvalidImageError as error:
            self._respond("invalid", _fields(error))
        except MemoryError:
            large = too_much_memory(self._needed_bytes, self._granted_bytes)
            self._respond("invalid", _fields(large))
        except _RefusedError:
            pass
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            _set_limit(resource.RLIMIT_DATA, resource.RLIM_INFINITY)

    def _admit(self, cost: Cost) -> None:
        """Waits until the parent admits the image, and sets its limits."""
        self._needed_bytes = cost.memory_bytes
        if cost.memory_bytes > self._granted_bytes:
            raise too_much_memory(cost.memory_bytes, self._granted_bytes)
        if cost.memory_bytes > FREE_BYTES:
            self._respond("needs", {"memory_bytes": cost.memory_bytes})
            head, _ = frames.receive(self._connection)
            if not pickle.loads(head):  # noqa: S301 - from our parent
                raise _RefusedError
        self._limit(cost)

    def _limit(self, cost: Cost) -> None:
        """Sets the limits of the kernel for the next part of the work."""
        used = _data_bytes()
        copies = self._file_bytes * _HEADER_COPIES
        if used:
            _set_limit(resource.RLIMIT_DATA, used + cost.memory_bytes + copies + _SLACK_BYTES)
        # The default action of SIGPROF ends the process.
        signal.setitimer(signal.ITIMER_PROF, cost.cpu_units * self._cpu_seconds)

    def _respond(self, kind: str, fields: dict[str, Any] | None = None, body: Buffer = b"") -> None:
        notes, _notes[:] = _notes[:], []
        fields = {"kind": kind, "notes": notes, **(fields or {})}
        if len(body) > frames.MAX_SOCKET_BODY_BYTES and self._shared != frames.NO_SHARED:
            frames.write_shared(self._shared, body)
            fields["shared_bytes"], body = len(body), b""
        head = json.dumps(fields, default=str)
        frames.send(self._connection, head.encode(), body)


def _fields(error: InvalidImageError) -> dict[str, Any]:
    violation = error.violation
    names = ("field", "reason", "message", "cause")
    return {name: getattr(violation, name) for name in names} | {"values": {**violation.values}}


def _check(data: bytes, **arguments: Any) -> tuple[dict[str, Any], Buffer]:
    checked = check_image(data, **arguments)
    names = ("prepared", "width", "height", "own_size")
    fields = {name: getattr(checked, name) for name in names}
    return fields, checked.data if checked.prepared else b""


def _prepare(data: bytes, **arguments: Any) -> tuple[dict[str, Any], Buffer]:
    return {}, prepare_image(data, **arguments).data.cast("B")


_TASKS: Final = {"check": _check, "prepare": _prepare}


def _set_limit(which: int, soft: int) -> None:
    hard = resource.getrlimit(which)[1]
    is_open = resource.RLIM_INFINITY in (soft, hard)  # its value is -1
    resource.setrlimit(which, (max(soft, hard) if is_open else min(soft, hard), hard))


def _data_bytes() -> int:
    """Returns the memory that RLIMIT_DATA counts; 0 where it is not known, as outside Linux."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def _die_with(parent: int) -> None:
    """Makes the kernel end this process with its parent, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # The parent is already dead.
        sys.exit(0)


def _take_note(_: Any, level: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """Keeps a log event for the parent, which logs it."""
    _notes.append({**event, "level": level})
    raise structlog.DropEvent


def main(descriptor: int, shared: int, parent: int) -> None:
    """Serves the parent.

    Args:
        descriptor: The socket, with the parent at the other end.
        shared: Shared memory for large bodies of responses, or NO_SHARED.
        parent: The process id of the parent.
    """
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return_large_blocks()
    structlog.configure(processors=[_take_note])
    _Server(socket.socket(fileno=descriptor), shared).serve()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
