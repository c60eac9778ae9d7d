"""The sockets of outbound connections: small reads that share the turns of the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from img2img_server.outbound import reading
from img2img_server.outbound.reading import CONTENT_READ_BYTES, READ_BYTES, ReadBudget

CONNECTIONS = 6
SENT = bytes(8 * READ_BYTES)


class Turn:
    """Numbers the turns of the loop."""

    number = 0


class Reads(asyncio.Protocol):
    """Notes the turn and the size of each read."""

    def __init__(self, turn: Turn, noted: list[tuple[int, int]]) -> None:
        self._turn = turn
        self._noted = noted
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._noted.append((self._turn.number, len(data)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


@asynccontextmanager
async def counted_turns() -> AsyncIterator[Turn]:
    turn = Turn()
    loop = asyncio.get_running_loop()

    def count() -> None:
        nonlocal handle
        turn.number += 1
        handle = loop.call_soon(count)

    handle = loop.call_soon(count)
    try:
        yield turn
    finally:
        handle.cancel()


async def read_everything(budget: ReadBudget, turn: Turn) -> list[tuple[int, int]]:
    """Returns turn and size of the reads of several connections whose data waits already."""
    noted: list[tuple[int, int]] = []
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", 0))
    senders, readers = [], []
    with listener:
        for _ in range(CONNECTIONS):
            reader = budget.open_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ()))
            reader.connect(listener.getsockname())
            reader.setblocking(False)
            sender, _ = listener.accept()
            sender.setblocking(False)
            senders.append(loop.create_task(loop.sock_sendall(sender, SENT)))
            senders[-1].add_done_callback(lambda _, sender=sender: sender.close())
            _, reads = await loop.create_connection(lambda: Reads(turn, noted), sock=reader)
            readers.append(reads)
        async with asyncio.timeout(20):
            lost = await asyncio.gather(*(reads.lost for reads in readers))
            await asyncio.gather(*senders, return_exceptions=True)
    assert all(error is None for error in lost), lost
    return noted


async def test_a_read_returns_a_small_piece() -> None:
    async with counted_turns() as turn:
        noted = await read_everything(ReadBudget(2**30), turn)
    assert sum(size for _, size in noted) == CONNECTIONS * len(SENT)
    assert max(size for _, size in noted) == READ_BYTES


async def test_one_read_uses_up_a_turn_if_it_takes_longer_than_the_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "TURN_SECONDS", 0.0)
    async with counted_turns() as turn:
        noted = await read_everything(ReadBudget(2**30), turn)
    turns = [number for number, _ in noted]
    assert len(set(turns)) == len(turns)
    assert sum(size for _, size in noted) == CONNECTIONS * len(SENT)


async def test_cheap_reads_of_several_connections_share_a_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reading, "TURN_SECONDS", 60.0)
    async with counted_turns() as turn:
        noted = await read_everything(ReadBudget(2**30), turn)
    turns = [number for number, _ in noted]
    assert len(set(turns)) < len(turns)


def test_reads_are_larger_while_most_of_the_bytes_are_content() -> None:
    budget = ReadBudget()
    budget.spend(1000)
    assert budget.read_bytes == READ_BYTES
    budget.add_content(600)
    assert budget.read_bytes == CONTENT_READ_BYTES
    budget.spend(1000)
    budget.add_content(400)
    assert budget.read_bytes == READ_BYTES


async def test_content_extends_the_budget_and_other_bytes_use_it_up() -> None:
    budget = ReadBudget(100)
    for _ in range(1000):
        budget.add_content(160)
        budget.spend(170)  # 160 bytes of content allow 10 more.
    budget.spend(100)
    assert not budget.exceeded
    with pytest.raises(ConnectionAbortedError):
        budget.spend(1)
    assert budget.exceeded
