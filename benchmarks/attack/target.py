"""The addresses and keys that callers know, and the type of an attack."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

# The attacker's own servers listen here, and its connections without a key come from here: the
# innocent tenant's come from 127.0.0.1. All of 127.0.0.0/8 is loopback.
ATTACKER_HOST = "127.0.0.66"


@dataclass(frozen=True)
class Target:
    """A running service as its callers see it. `keys`: API keys by tenant."""

    grpc_port: int
    http_port: int
    keys: dict[str, str]

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def attacker(self) -> str:
        """The key of the attacking tenant."""
        return self.keys["attacker-1"]

    def metadata(self, tenant: str) -> tuple[tuple[str, str], ...]:
        """Returns the gRPC metadata with the tenant's key."""
        return (("authorization", f"Bearer {self.keys[tenant]}"),)

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass
class Progress:
    """The report of an attack: whether it is under way, and how its requests ended."""

    is_under_way: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)

    def under_way(self) -> None:
        """Starts the measurement. Call it once the attack does what it is meant to do."""
        self.is_under_way = True


Run = Callable[[Target, Progress, Mapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        name: Its finding and its kind, for example "F1-scans".
        title: A description of the attack.
        run: Attacks until it is cancelled, with these parameters. It runs in a process of its own.
        parameters: Those of the full form.
        short: Changes of the parameters in the short form. None: the short form leaves it out.
        settings: Settings of the service that differ from their defaults.
        seconds: The least time that the innocent tenant calls during the attack.
        keeps_events: Whether the events of another tenant's job must outlast the attack.
    """

    name: str
    title: str
    run: Run
    parameters: Mapping[str, Any] = field(default_factory=dict)
    short: Mapping[str, Any] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 6.0
    keeps_events: bool = False

    def chosen(self, *, short: bool) -> dict[str, Any]:
        """Returns the parameters of the full or the short form."""
        return {**self.parameters, **((self.short or {}) if short else {})}
