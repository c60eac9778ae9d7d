"""Keys of requests before they are read, and the shares of connections."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.datastructures import Headers

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http import callers
from img2img_server.gateway.http.callers import Callers, KeySearch, header_key
from img2img_server.gateway.http.connections import Connections
from img2img_server.peers import grpc_peer_of, is_in, peer_of


class Api:
    """Answers which tenant a key belongs to, and counts the questions."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.kind = ErrorKind.BAD_KEY
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def tenant(self, key: str) -> str:
        self.asked.append(key)
        await self.go_on.wait()
        if not key.startswith("right"):
            raise RequestError(self.kind)
        return f"tenant of {key}"


async def test_the_api_is_asked_once_for_a_while_about_a_right_or_wrong_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr("img2img_server.gateway.http.callers.time.monotonic", lambda: now)
    api = Api()
    known = Callers(api.tenant)
    for _ in range(3):
        assert await known.tenant("right") == "tenant of right"
        assert await known.tenant("wrong") == ""
        assert await known.tenant("") == ""
    assert api.asked == ["right", "wrong"]
    now = 11.0
    await known.tenant("right")
    await known.tenant("wrong")
    assert api.asked == ["right", "wrong"] * 2


async def test_an_api_that_cannot_be_asked_makes_no_key_wrong() -> None:
    api = Api()
    api.kind = ErrorKind.UNAVAILABLE
    known = Callers(api.tenant)
    assert [await known.tenant("wrong") for _ in range(2)] == ["", ""]
    assert api.asked == ["wrong", "wrong"]


async def test_random_keys_take_bounded_memory_and_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callers, "MOST_ENTRIES", 10)
    api = Api()
    known = Callers(api.tenant)
    for number in range(50):
        await known.tenant(f"wrong {number}")
    assert len(known._known) == 10

    api.go_on.clear()
    api.asked.clear()
    asking = [asyncio.create_task(known.tenant(f"right {number}")) for number in range(500)]
    await asyncio.sleep(0)
    assert len(api.asked) == callers._MOST_AT_ONCE
    api.go_on.set()
    found = await asyncio.gather(*asking)
    assert len([tenant for tenant in found if tenant]) == callers._MOST_AT_ONCE


def fed(body: bytes, size: int) -> list[str]:
    """Returns the candidates of a body that arrives in parts of this size."""
    search, arrived, found = KeySearch(), bytearray(), []
    for at in range(0, len(body), size):
        arrived += body[at : at + size]
        found += search.candidates(arrived)
    return found


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
@pytest.mark.parametrize(
    ("body", "keys"),
    [
        (b'{"key": "abc", "prompt": "a"}', ["abc"]),
        (b'{"prompt": "' + b"x" * 5000 + b'", "key"\n :\t"abc"}', ["abc"]),
        (json.dumps({"key": 'a"ü\\'}).encode(), ['a"ü\\']),
        (b'{"key": null, "prompt": "key"}', []),
        (b'{"key": "' + b"x" * 2000 + b'"}', []),
        (b'{"a": {"key": "b"}, "key": "c"}', ["b", "c"]),
        (b'{"key":"1","key":"2","key":"3","key":"4"}', ["1", "2", "3"]),
        (b'{"key": "\\u12"}', []),
        (b"", []),
    ],
)
def test_the_key_of_a_body_is_found_as_it_arrives(size: int, body: bytes, keys: list[str]) -> None:
    assert fed(body, size) == keys


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer a", "key": "b", "x-api-key": "c"}, "a"),
        ({"authorization": "bearer  a "}, "a"),
        ({"authorization": "Basic a", "key": "b"}, "b"),
        ({"authorization": "Bearer ", "x-api-key": "c"}, "c"),
        ({}, ""),
    ],
)
def test_the_first_key_of_the_headers_counts(headers: dict[str, str], key: str) -> None:
    assert header_key(Headers(headers)) == key


def test_peers_and_tenants_leave_connections_free_for_others() -> None:
    connections = Connections(100)

    def opened(peer: str) -> int:
        return len([n for n in range(200) if connections.open(peer, lambda: None)])

    assert [opened(f"192.0.2.{number}") for number in range(4)] == [50, 25, 13, 6]


async def test_the_latest_connection_that_waits_replaces_the_oldest_one_of_its_peer() -> None:
    closed, admitted = [], asyncio.Queue[int]()
    connections = Connections(4)
    for number in range(2):
        assert connections.open("192.0.2.1", lambda number=number: closed.append(number))
    other = connections.open("192.0.2.2", lambda: pytest.fail("closed"))
    for number in range(2, 4):
        waiting = connections.open(
            "192.0.2.1", lambda: None, lambda number=number: admitted.put_nowait(number)
        )
        assert waiting
        assert not waiting.owner

    assert [await admitted.get(), await admitted.get()] == [3, 2]
    assert closed == [0, 1]
    assert other
    assert other.owner == "192.0.2.2"


async def test_a_connection_that_waits_gets_the_place_of_one_that_ends() -> None:
    admitted: list[str] = []
    connections = Connections(2)
    assert connections.open("192.0.2.3", lambda: None)
    first = connections.open("192.0.2.1", lambda: pytest.fail("closed"))
    assert first
    waiting = connections.open("192.0.2.2", lambda: None, lambda: admitted.append("192.0.2.2"))
    gone = connections.open("192.0.2.2", lambda: None, lambda: admitted.append("gone"))
    assert waiting
    assert gone
    connections.close(gone)

    connections.close(first)

    assert admitted == ["192.0.2.2"]
    assert waiting.owner == "192.0.2.2"


def test_connections_of_valid_keys_are_never_replaced() -> None:
    connections = Connections(3)
    for tenant in ("a", "b"):
        connection = connections.open("192.0.2.1", lambda: pytest.fail("closed"))
        assert connection
        assert connections.claim(connection, f"tenant {tenant}", has_key=True)
    another = connections.open("192.0.2.1", lambda: None)
    assert another
    assert not connections.claim(another, "tenant a", has_key=True)
    assert connections.claim(another, "tenant c", has_key=True)

    assert connections.open("192.0.2.2", lambda: None) is None


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("ipv4:192.0.2.1:50051", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:50051", "2001:db8::/64"),
        ("ipv6:[2001:db8::2]:50052", "2001:db8::/64"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:1", "192.0.2.1"),
        ("unix:", "unknown"),
    ],
)
def test_peers_of_grpc_are_named_by_address_or_network(peer: str, name: str) -> None:
    assert grpc_peer_of(peer) == name


def test_addresses_of_networks() -> None:
    assert peer_of("fe80::1%eth0") == "fe80::/64"
    assert is_in("10.1.2.3", ["192.0.2.1", "10.0.0.0/8"])
    assert not is_in("11.1.2.3", ["192.0.2.1", "10.0.0.0/8"])
    assert not is_in("unknown", ["0.0.0.0/0"])
    assert not is_in("::1", ["10.0.0.0/8"])
