"""Runs one attack against a running service and judges the result."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from benchmarks.attack import images
from benchmarks.attack.callers import SECONDS, spec, stub_of
from benchmarks.attack.kinds.streams import finished_job
from benchmarks.attack.measure import Latencies, innocent_calls, peak_memory
from benchmarks.attack.service import Service, command
from benchmarks.attack.target import Attack, Target
from img2img.v1 import service_pb2

TIMES, PLUS_SECONDS = 3.0, 1.0
MOST_MB = {"api": 800, "gateway": 800}
SHORT_SECONDS = 2.0
CALLS = 5  # the least number of calls of each way, alone and under attack
UNDER_WAY_SECONDS = 120.0


@dataclass
class Outcome:
    """The result of one attack. `faults`: why it is red."""

    attack: str
    title: str
    parameters: dict[str, Any]
    alone: dict[str, Latencies]
    attacked: dict[str, Latencies]
    peak_mb: dict[str, int]
    requests: dict[str, int]
    faults: list[str] = field(default_factory=list)


async def measure(
    service: Service, attack: Attack, *, short: bool, alone: dict[str, Latencies] | None = None
) -> Outcome:
    """Runs the attack once.

    Args:
        alone: The innocent tenant's calls without an attack; measured here if it is None.
    """
    target, parameters = service.target, attack.chosen(short=short)
    calls = 3 if short else CALLS
    if alone is None:
        await innocent_calls(target, least=1)  # warms the roles up
        alone = await innocent_calls(target, least=calls)
    log = await _Log.of(target) if attack.keeps_events else None
    seconds = min(attack.seconds, SHORT_SECONDS) if short else attack.seconds
    async with (
        peak_memory(service.processes()) as peaks,
        _attacking(attack, target, parameters) as attacker,
    ):
        attacked = await innocent_calls(target, least=calls, seconds=seconds)
    peak_mb = {name: round(peak / 1e6) for name, peak in peaks.items()}
    outcome = Outcome(
        attack.name, attack.title, parameters, alone, attacked, peak_mb, dict(attacker.requests)
    )
    outcome.faults = [
        *slow(alone, attacked),
        *(
            f"{name} took {peak_mb[name]} MB"
            for name, most in MOST_MB.items()
            if peak_mb[name] >= most
        ),
        *(f"{name} ended" for name in service.died()),
        *([attacker.fault] if attacker.fault else []),
    ]
    if log is not None:
        outcome.faults += await log.missing(target)
    return outcome


def slow(alone: dict[str, Latencies], attacked: dict[str, Latencies]) -> list[str]:
    """Returns what is wrong with the innocent tenant's calls."""
    faults = []
    for way, latencies in attacked.items():
        bound = TIMES * alone[way].worst + PLUS_SECONDS
        if latencies.worst > bound:
            faults.append(f"{way} took {latencies.worst:.1f} s, at most {bound:.1f} s are allowed")
        if latencies.failures:
            count, calls = len(latencies.failures), len(latencies.seconds)
            faults.append(f"{way} failed {count} of {calls} times: {latencies.failures[0]}")
    return faults


class _Log:
    """The events of an ended job of the innocent tenant, which must outlast the attack."""

    def __init__(self, name: str, events: list[tuple[int, str]]) -> None:
        self._name = name
        self._events = events

    @classmethod
    async def of(cls, target: Target) -> _Log:
        name = await finished_job(target, "innocent", spec(images.plain(64, "JPEG")))
        return cls(name, await _replay(target, name))

    async def missing(self, target: Target) -> list[str]:
        """Returns a fault if events are missing now."""
        events = await _replay(target, self._name)
        if events == self._events:
            return []
        return [f"{len(events)} of {len(self._events)} events of a job that ended before are left"]


async def _replay(target: Target, name: str) -> list[tuple[int, str]]:
    """Returns the job's events: sequence and kind."""
    metadata, request = target.metadata("innocent"), service_pb2.WatchJobRequest(name=name)
    try:
        async with stub_of(target) as stub:
            watch = stub.WatchJob(request, metadata=metadata, timeout=SECONDS)
            return [(m.event.sequence, m.event.WhichOneof("event")) async for m in watch]
    except grpc.aio.AioRpcError as error:
        return [(-1, error.code().name)]


@dataclass
class _Attacker:
    """The attacker's process, as far as its reports have been read."""

    requests: Counter[str] = field(default_factory=Counter)
    fault: str = ""


@asynccontextmanager
async def _attacking(
    attack: Attack, target: Target, parameters: dict[str, Any]
) -> AsyncIterator[_Attacker]:
    """Yields once the attack is under way. Ends it with the context."""
    process = await asyncio.create_subprocess_exec(
        *command("benchmarks.attack.attacker", attack.name, json.dumps(parameters), target.dump()),
        stdout=asyncio.subprocess.PIPE,
    )
    attacker, started = _Attacker(), asyncio.Event()
    reading = asyncio.create_task(_read(process, attacker, started))
    try:
        async with asyncio.timeout(UNDER_WAY_SECONDS):
            await started.wait()
        yield attacker
        if reading.done():
            attacker.fault = "the attack ended by itself"
    except TimeoutError:
        attacker.fault = "the attack did not get under way"
        raise
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


async def _read(
    process: asyncio.subprocess.Process, attacker: _Attacker, started: asyncio.Event
) -> None:
    assert process.stdout is not None
    async for line in process.stdout:
        report = json.loads(line)
        attacker.requests = Counter(report["outcomes"])
        if report["under_way"]:
            started.set()
    started.set()  # The process has ended.
