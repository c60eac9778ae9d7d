"""Messages between a role and a process that decodes images, on a socket.

A message is two lengths of 4 bytes, a head and a body. The role sends pickled heads; the process,
which handles untrusted images, sends JSON.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import Final, TypeAlias

LENGTHS: Final = struct.Struct("!II")
# A process that an image has taken over could announce any length.
MAX_HEAD_BYTES: Final = 2**20
MAX_BODY_BYTES: Final = 2**28
Buffer: TypeAlias = bytes | bytearray | memoryview
_READ_BYTES: Final = 2**18
_SOCKET_BYTES: Final = 2**20  # the kernel may give less


# Larger bodies of responses are passed in shared memory. On a busy machine, each wait for the other
# side to empty or fill the socket costs milliseconds.
MAX_SOCKET_BODY_BYTES: Final = 2**16
# Shared memory beyond this is given back after each use.
_KEPT_SHARED_BYTES: Final = 2**21
NO_SHARED: Final = -1


class FrameError(Exception):
    """The other side has closed the socket or sends no messages of this kind."""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Returns two connected sockets with large buffers."""
    pair = socket.socketpair()
    for each in pair:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            each.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BYTES)
    return pair


def open_shared() -> int:
    """Returns a descriptor of shared memory, or NO_SHARED on systems without it."""
    return os.memfd_create("decoded image") if hasattr(os, "memfd_create") else NO_SHARED


def write_shared(descriptor: int, body: Buffer) -> None:
    """Writes a body to shared memory."""
    view, at = memoryview(body), 0
    while at < len(view):
        at += os.pwrite(descriptor, view[at:], at)


def read_shared(descriptor: int, size: int) -> bytearray:
    """Reads a body from shared memory. Raises FrameError, OSError."""
    if not 0 <= size <= MAX_BODY_BYTES:
        raise FrameError
    body = bytearray(size)
    if os.preadv(descriptor, [body], 0) != size:
        raise FrameError
    if size > _KEPT_SHARED_BYTES:
        os.ftruncate(descriptor, 0)
    return body


def send(connection: socket.socket, head: bytes, body: Buffer = b"") -> None:
    """Sends a message. Blocks."""
    length = memoryview(body).nbytes
    connection.sendall(LENGTHS.pack(len(head), length) + head)
    if length:
        connection.sendall(body)


def receive(connection: socket.socket) -> tuple[bytes, bytearray]:
    """Receives a message. Blocks. Raises FrameError."""
    head_bytes, body_bytes = _lengths(_exactly(connection, LENGTHS.size))
    return bytes(_exactly(connection, head_bytes)), _exactly(connection, body_bytes)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise FrameError
        view = view[count:]
    return data


def _lengths(start: Buffer) -> tuple[int, int]:
    head_bytes, body_bytes = LENGTHS.unpack_from(start)
    if head_bytes > MAX_HEAD_BYTES or body_bytes > MAX_BODY_BYTES:
        raise FrameError
    return head_bytes, body_bytes


async def send_async(connection: socket.socket, head: bytes, body: bytes = b"") -> None:
    """Sends a message on a non-blocking socket. Raises OSError."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, LENGTHS.pack(len(head), len(body)) + head)
    if body:
        await loop.sock_sendall(connection, body)


async def receive_async(connection: socket.socket) -> tuple[bytes, bytearray]:
    """Receives a message from a non-blocking socket. Raises FrameError, OSError."""
    loop = asyncio.get_running_loop()
    first = b""
    while len(first) < LENGTHS.size or len(first) < LENGTHS.size + _lengths(first)[0]:
        chunk = await loop.sock_recv(connection, _READ_BYTES)
        if not chunk:
            raise FrameError
        first += chunk
    head_bytes, body_bytes = _lengths(first)
    body_start = LENGTHS.size + head_bytes
    body, came = bytearray(body_bytes), len(first) - body_start
    if came > body_bytes:
        raise FrameError
    body[:came] = first[body_start:]
    view = memoryview(body)[came:]
    while view:
        count = await loop.sock_recv_into(connection, view)
        if not count:
            raise FrameError
        view = view[count:]
    return first[LENGTHS.size : body_start], body
