"""How long to wait between the attempts at a webhook."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

DELAYS_SECONDS = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 21600.0)
SPREAD = 0.2
LONGEST_RETRY_AFTER_SECONDS = 3600.0
CROWDED_SECONDS = 5.0
LONGEST_CROWDED_SECONDS = 300.0

_random = secrets.SystemRandom()


@dataclass(frozen=True, slots=True)
class BackoffPolicy:
    """The table of pauses, so that one attempt more than it has entries is made.

    `spread`: share by which a pause is lengthened or shortened at random, so that what failed
    together does not come back together. `crowded_seconds`: the first pause of what found no place.
    """

    delays_seconds: tuple[float, ...] = DELAYS_SECONDS
    spread: float = SPREAD
    uniform: Callable[[float, float], float] = _random.uniform
    crowded_seconds: float = CROWDED_SECONDS

    def after(self, attempt: int, retry_after_seconds: float = 0.0) -> float | None:
        """Seconds to wait after a failed attempt, from 1; None when it was the last.

        Args:
            retry_after_seconds: what the receiver asked for; it lengthens a pause, up to an hour.
        """
        if attempt > len(self.delays_seconds):
            return None
        pause = self._spread(self.delays_seconds[attempt - 1])
        return max(pause, min(retry_after_seconds, LONGEST_RETRY_AFTER_SECONDS))

    def overflow_delay(self, times: int) -> float:
        """Seconds to wait for a place after so many times without one: twice as long each time."""
        longest = min(self.crowded_seconds * 2.0 ** min(times, 10), LONGEST_CROWDED_SECONDS)
        return self._spread(longest)

    def _spread(self, seconds: float) -> float:
        return seconds * self.uniform(1 - self.spread, 1 + self.spread)
