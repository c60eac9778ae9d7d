"""F5: HTTP requests that never end, with and without a key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from benchmarks.attack.callers import connect, hold_open, post, repeat
from benchmarks.attack.measure import IMG2IMG
from benchmarks.attack.target import ATTACKER_HOST, Attack, Progress, Target

_SETTLE_SECONDS = 3.0  # Thousands of connections are open by then.
_MOST = 32 * 2**20


async def _hold_all(
    target: Target,
    progress: Progress,
    data: bytes,
    connections: int,
    *,
    peers: int = 1,
    trickle: bytes = b"",
) -> None:
    async with asyncio.TaskGroup() as group:
        for at in range(connections):
            source = ATTACKER_HOST if peers == 1 else f"127.0.1.{at % peers + 1}"
            holding = hold_open(progress, target.http_port, data, source=source, trickle=trickle)
            group.create_task(holding)
        await asyncio.sleep(_SETTLE_SECONDS)
        progress.under_way()


async def large_bodies(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Holds POSTs that lack the last bytes of a body of `bytes`."""
    key = target.attacker if sizes.get("key") else ""
    body = b'{"prompt": "' + b"a" * (sizes["bytes"] - 20)
    data = post(IMG2IMG, sizes["bytes"], body, key=key)
    await _hold_all(
        target, progress, data, sizes["connections"], peers=sizes["peers"], trickle=b"a"
    )


async def short_bodies(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Holds POSTs of which one byte of the body arrives."""
    data = post(IMG2IMG, 1000, b"{")
    await _hold_all(target, progress, data, sizes["connections"], peers=sizes["peers"])


async def unfinished_headers(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Holds connections whose headers do not end."""
    data = b"POST / HTTP/1.1\r\nHost: localhost\r\nX-A: "
    trickle = b"a" if sizes["trickles"] else b""
    await _hold_all(
        target, progress, data, sizes["connections"], peers=sizes["peers"], trickle=trickle
    )


async def silent_connections(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Holds connections on which nothing is sent."""
    await _hold_all(target, progress, b"", sizes["connections"], peers=sizes["peers"])


async def slow_uploads(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Uploads bodies slowly with a valid key, from many addresses."""
    data = post(IMG2IMG, _MOST, b'{"prompt": "', key=target.attacker)
    connections, peers = sizes["connections"], sizes["peers"]
    await _hold_all(target, progress, data, connections, peers=peers, trickle=b"a")


async def many_values(target: Target, progress: Progress, sizes: Mapping[str, Any]) -> None:
    """Posts jobs with tens of thousands of annotations."""
    notes = {f"note-{number}": "x" * sizes["characters"] for number in range(sizes["notes"])}
    body = json.dumps({"spec": {"prompt": "a", "annotations": notes}}).encode()
    data = post("/v1/jobs", len(body), body, key=target.attacker, more="Connection: close\r\n")

    async def send() -> None:
        reader, writer = await connect(target.http_port)
        try:
            writer.write(data)
            await writer.drain()
            answer = await reader.read()
            progress.outcomes[answer[9:12].decode(errors="replace") or "closed"] += 1
        finally:
            writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(sizes["calls"]):
            group.create_task(repeat(progress, send))
        progress.under_way()


ATTACKS = (
    Attack(
        "F5-large-bodies",
        "POSTs of 32 MB without their last bytes, no key",
        large_bodies,
        {"connections": 4, "bytes": _MOST, "peers": 1},
        {},
    ),
    Attack(
        "F5-large-bodies-many-peers",
        "POSTs of 32 MB without their last bytes, no key, from 20 addresses",
        large_bodies,
        {"connections": 40, "bytes": _MOST, "peers": 20},
    ),
    Attack(
        "F5-large-bodies-key",
        "POSTs of 32 MB without their last bytes, with a key, from 20 addresses",
        large_bodies,
        {"connections": 20, "bytes": _MOST, "peers": 20, "key": True},
    ),
    Attack(
        "F5-short-bodies",
        "POSTs of which one byte arrives, no key",
        short_bodies,
        {"connections": 2000, "peers": 1},
    ),
    Attack(
        "F5-short-bodies-many-peers",
        "POSTs of which one byte arrives, no key, from 20 addresses",
        short_bodies,
        {"connections": 2000, "peers": 20},
    ),
    Attack(
        "F5-unfinished-headers",
        "connections whose headers arrive byte by byte",
        unfinished_headers,
        {"connections": 2000, "peers": 1, "trickles": True},
    ),
    Attack(
        "F5-silent-connections",
        "connections on which nothing arrives, from 20 addresses",
        silent_connections,
        {"connections": 2000, "peers": 20},
    ),
    Attack(
        "F5-slow-uploads",
        "slow uploads with a valid key from 100 addresses",
        slow_uploads,
        {"connections": 500, "peers": 100},
    ),
    Attack(
        "F14-annotations",
        "POST /v1/jobs with 39,000 annotations",
        many_values,
        {"calls": 4, "notes": 39_000, "characters": 790},
    ),
)
