"""The short form of `make attack`, which measures the calls of one tenant while another attacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.attack.__main__ import run
from benchmarks.attack.kinds import ALL
from benchmarks.attack.measure import Latencies
from benchmarks.attack.runner import slow

SHORT = [attack for attack in ALL if attack.short is not None]


@pytest.mark.slow
async def test_no_attack_slows_another_tenant_down_or_fills_memory(tmp_path: Path) -> None:
    outcomes = await run(SHORT, short=True, folder=tmp_path / "first")
    red = {outcome.attack for outcome in outcomes if outcome.faults}
    if red:  # Something else may have used the CPU.
        again = [attack for attack in SHORT if attack.name in red]
        outcomes = await run(again, short=True, folder=tmp_path / "second")
    assert {outcome.attack: outcome.faults for outcome in outcomes if outcome.faults} == {}


def test_a_slow_call_and_a_failed_one_are_faults() -> None:
    alone = {"grpc": Latencies([0.1, 0.2]), "http": Latencies([0.1])}
    assert slow(alone, {"grpc": Latencies([1.6]), "http": Latencies([1.3])}) == []
    attacked = {"grpc": Latencies([0.1, 1.7]), "http": Latencies([0.1], ["503: busy"])}
    assert slow(alone, attacked) == [
        "grpc took 1.7 s, at most 1.6 s are allowed",
        "http failed 1 of 1 times: 503: busy",
    ]
