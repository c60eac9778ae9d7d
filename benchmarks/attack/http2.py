"""An HTTP/2 connection that can stop anywhere in a gRPC call, which no client library can.

It compresses no header and reads only as much of the responses as its caller wants.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Mapping
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INITIAL_WINDOW, MAX_FRAME = 65_535, 16_384


def grpc_message(message: bytes, announced: int | None = None) -> bytes:
    """Returns a message with its gRPC prefix. `announced`: the length that the prefix names."""
    return b"\0" + struct.pack(">I", len(message) if announced is None else announced) + message


def text_field(number: int, size: int) -> bytes:
    """Returns a protobuf field with a text of this size."""
    return bytes([number << 3 | 2]) + _varint(size) + b"a" * size


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    if len(data) < 127:
        return bytes([len(data)]) + data
    return b"\x7f" + _varint(len(data) - 127) + data


def _header(name: str, value: str | bytes) -> bytes:
    return b"\0" + _string(name) + _string(value)  # a literal that is not indexed


class Connection:
    """One connection. `reads`: whether it returns flow-control credit for the data it receives.

    Attributes:
        received: Bytes of response data by stream.
        sent: Bytes of request data by stream.
        ended: Streams that the server has ended.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reads: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._reads = reads
        self._next_stream = 1
        self._credit = INITIAL_WINDOW
        self._initial = INITIAL_WINDOW
        self._credits: dict[int, int] = {}
        self._changed = asyncio.Condition()
        self.received: Counter[int] = Counter()
        self.sent: Counter[int] = Counter()
        self.ended: set[int] = set()
        self.closed = False
        self._receiving = asyncio.create_task(self._receive())

    @classmethod
    async def open(cls, port: int, *, source: str = "", reads: bool = True) -> Self:
        """Opens a connection to a port of 127.0.0.1, from a loopback address."""
        local = (source, 0) if source else None
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=local)
        connection = cls(reader, writer, reads=reads)
        writer.write(PREFACE + connection._frame(SETTINGS, 0, 0, b""))
        await writer.drain()
        return connection

    async def call(
        self, method: str, key: str = "", metadata: Mapping[str, str | bytes] | None = None
    ) -> int:
        """Sends the headers of a gRPC call and returns the number of its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._credits[stream] = self._initial
        fields: dict[str, str | bytes] = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        if key:
            fields["authorization"] = f"Bearer {key}"
        fields |= metadata or {}
        block = b"".join(_header(name, value) for name, value in fields.items())
        await self._write(self._frame(HEADERS, END_HEADERS, stream, block))
        return stream

    async def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Sends data as the server's flow control allows; returns when it is sent or refused."""
        view = memoryview(data)
        while view and not self.closed and stream not in self.ended:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: (
                        min(self._credit, self._credits[stream]) > 0
                        or self.closed
                        or stream in self.ended
                    )
                )
            size = min(self._credit, self._credits[stream], MAX_FRAME, len(view))
            if size <= 0:
                return
            self._credit -= size
            self._credits[stream] -= size
            self.sent[stream] += size
            await self._write(self._frame(DATA, 0, stream, bytes(view[:size])))
            view = view[size:]
        if end and stream not in self.ended:
            await self._write(self._frame(DATA, END_STREAM, stream, b""))

    async def until_ended(self, stream: int) -> None:
        """Waits until the server ends the stream or the connection."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.closed or stream in self.ended)

    async def close(self) -> None:
        self._receiving.cancel()
        self._writer.close()

    async def _write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            self.closed = True

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
        )

    async def _receive(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
                stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
                payload = await self._reader.readexactly(size)
                async with self._changed:
                    await self._take(kind, flags, stream, payload)
                    self._changed.notify_all()
        except (OSError, asyncio.IncompleteReadError):
            pass
        async with self._changed:
            self.closed = True
            self._changed.notify_all()

    async def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, at)
                if name == 4:
                    for open_stream in self._credits:
                        self._credits[open_stream] += value - self._initial
                    self._initial = value
            await self._write(self._frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            await self._write(self._frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big") & 0x7FFFFFFF
            if stream == 0:
                self._credit += increment
            elif stream in self._credits:
                self._credits[stream] += increment
        elif kind == DATA:
            self.received[stream] += len(payload)
            if self._reads and payload:
                credit = struct.pack(">I", len(payload))
                await self._write(
                    self._frame(WINDOW_UPDATE, 0, 0, credit)
                    + self._frame(WINDOW_UPDATE, 0, stream, credit)
                )
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self.ended.add(stream)
