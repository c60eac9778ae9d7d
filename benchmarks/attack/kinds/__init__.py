"""The attacks, one module for each kind. A new attack is one more entry of its module's ATTACKS."""

from __future__ import annotations

from benchmarks.attack.kinds import bodies, calls, decoding, events, fetching, messages, streams
from benchmarks.attack.target import Attack

ALL: tuple[Attack, ...] = (
    *decoding.ATTACKS,
    *fetching.ATTACKS,
    *messages.ATTACKS,
    *bodies.ATTACKS,
    *streams.ATTACKS,
    *events.ATTACKS,
    *calls.ATTACKS,
)
