"""Unix time by the clock of NATS, which all roles share, and reports of clocks that differ.

Times in records and events, durations between two machines and expiry use `now`, so that a machine
whose clock is wrong does no harm. Durations within a process use monotonic time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from img2img_server.telemetry import CLOCK_SKEW

TOLERATED_SECONDS: Final = 2.0  # a difference of clocks that is not reported
REPORT_SECONDS: Final = 600.0  # seconds until the same difference is logged again

log = logging.getLogger(__name__)


class SkewReport:
    """Logs how far this machine's clock is from another one, and sets the metric.

    Args:
        against: the owner of the other clock, "NATS" or "the object store".
        effect: the effect of a difference, a sentence for the operator.
    """

    def __init__(self, against: str, effect: str) -> None:
        self._against = against
        self._effect = effect
        self._logged = (0.0, 0.0)  # the difference that was logged last, and when
        self.seconds = 0.0

    def note(self, seconds: float) -> None:
        """Reports a measured difference: local time minus the other time."""
        self.seconds = seconds
        CLOCK_SKEW.labels(self._against).set(seconds)
        last, at = self._logged
        now = time.monotonic()
        if abs(seconds) <= TOLERATED_SECONDS:
            if last:
                log.warning("clock_skew_ended: the clock agrees with that of %s", self._against)
            self._logged = (0.0, 0.0)
        elif abs(seconds - last) > TOLERATED_SECONDS or now - at > REPORT_SECONDS:
            self._logged = (seconds, now)
            log.warning("clock_skew: %s. %s", self.sentence, self._effect)

    @property
    def sentence(self) -> str:
        """The difference as a sentence; empty if it is tolerated."""
        if abs(self.seconds) <= TOLERATED_SECONDS:
            return ""
        direction = "ahead of" if self.seconds > 0 else "behind"
        size = f"{abs(self.seconds):.1f} s {direction} that of {self._against}"
        return f"the clock of this machine is {size}; synchronise it (NTP)"


class Clock:
    """A clock that starts with the local time and follows another clock."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._base = wall() - monotonic()
        self.skew = SkewReport("NATS", "Times in records and events are those of NATS.")

    def now(self) -> float:
        """Returns Unix seconds."""
        return self._monotonic() + self._base

    def observe(self, other: float, asked: float, answered: float) -> None:
        """Follows another clock, whose time was `other` at some moment between two monotonic times.

        Changes nothing if the own time is possible.
        """
        self._base = min(max(self._base, other - answered), other - asked)
        self.skew.note(self._wall() - self.now())


CLOCK = Clock()


def now() -> float:
    """Returns Unix seconds by the clock of NATS, as far as it was measured."""
    return CLOCK.now()
