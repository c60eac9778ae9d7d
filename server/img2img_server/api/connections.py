"""Closes connections of peers that have more than their share.

gRPC limits the connections of all peers together and none of a single one: so one peer could take
all. gRPC for Python does not give its connections to the application either, so this module finds
their sockets among the open files of the process.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from img2img_server.peers import peer_of

SECONDS: Final = 1.0  # between two checks
_FILES: Final = Path("/proc/self/fd")  # only Linux has it

log = structlog.get_logger()


class PeerLimit:
    """Limits the connections of each peer: a peer has no more than it leaves free of `most`.

    It keeps the connections of a peer that were there first.
    """

    def __init__(self, port: int, most: int) -> None:
        self._port = port
        self._most = most
        self._seen: dict[tuple[str, int], int] = {}  # the first check with a connection
        self._checks = 0

    async def watch(self) -> None:
        """Checks the connections until it is cancelled."""
        while _FILES.exists():
            await asyncio.sleep(SECONDS)
            if closed := await asyncio.to_thread(self.close_surplus):
                log.warning("grpc_connections_closed", reason="too many of one peer", peers=closed)

    def close_surplus(self) -> dict[str, int]:
        """Closes connections of peers with too many. Returns their numbers by peer."""
        if len(os.listdir(_FILES)) * 4 < self._most:
            return {}
        self._checks += 1
        peers: defaultdict[str, list[tuple[int, socket.socket]]] = defaultdict(list)
        seen: dict[tuple[str, int], int] = {}
        closed: dict[str, int] = {}
        total = 0
        try:
            for connection, address in self._connections():
                seen[address] = self._seen.get(address, self._checks)
                peers[peer_of(address[0])].append((seen[address], connection))
                total += 1
            for peer in sorted(peers, key=lambda each: -len(peers[each])):
                held = sorted(peers[peer], key=lambda each: each[0])
                surplus = 0
                while len(held) - surplus > max(1, self._most - total + surplus):
                    surplus += 1
                    with suppress(OSError):
                        held[-surplus][1].shutdown(socket.SHUT_RDWR)
                if surplus:
                    closed[peer] = surplus
                    total -= surplus
        finally:
            for held in peers.values():
                for _, connection in held:
                    connection.close()
        self._seen = seen
        return closed

    def _connections(self) -> Iterator[tuple[socket.socket, tuple[str, int]]]:
        """Yields duplicates of the sockets of connections to the port, and their peers' addresses.

        A duplicate stays the same connection when gRPC closes its own.
        """
        for name in os.listdir(_FILES):
            with suppress(OSError):
                if not os.readlink(_FILES / name).startswith("socket:"):
                    continue
                connection = socket.socket(fileno=os.dup(int(name)))
                try:
                    is_ours = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if is_ours and connection.getsockname()[1] == self._port:
                        host, port, *_ = connection.getpeername()
                        yield connection, (host, port)
                        continue
                except OSError:  # a socket that listens
                    pass
                connection.close()
