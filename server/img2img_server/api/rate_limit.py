"""The rate of a key: jobs that it makes, and requests that cost a look at a picture for nothing."""

from __future__ import annotations

from typing import Final

from img2img_server import errors
from img2img_server.api.keys import Principal
from img2img_server.nats.rates import Rates

MISTAKES: Final = 10  # a minute, that a key may make however few its jobs are


class RateLimit:
    """What each key may ask for in a minute. One for the life of the api.

    Jobs are counted when nothing speaks against them any more. Requests that were refused after
    their picture was fetched or decoded have a count of their own: a mistake costs a caller none of
    its jobs, and a flood of mistakes is told so before it costs another download.

    Args:
        per_minute: of keys that have no limit of their own; 0: any number.
    """

    def __init__(self, rates: Rates, per_minute: int) -> None:
        self._rates = rates
        self._per_minute = per_minute

    def check(self, key: Principal) -> None:
        """Whether there is room, as far as this api knows; counts nothing.

        Raises:
            RateLimitedError: there is none, for jobs or after too many refused requests.
        """
        if not (jobs := self._jobs(key)):
            return
        for name, most in ((key.key_id, jobs), (_refused(key), max(jobs, MISTAKES))):
            if wait := self._rates.wait(name, most):
                raise errors.RateLimitedError(most, wait)

    async def count_job(self, key: Principal) -> None:
        """Raises RateLimitedError when there is no room, UnavailableError when the bus is down."""
        jobs = self._jobs(key)
        if jobs and (wait := await self._rates.take(key.key_id, jobs)):
            raise errors.RateLimitedError(jobs, wait)

    async def count_refused(self, key: Principal) -> None:
        """Raises UnavailableError when the bus is down."""
        if jobs := self._jobs(key):
            await self._rates.take(_refused(key), max(jobs, MISTAKES))

    def _jobs(self, key: Principal) -> int:
        return self._per_minute if key.rate_limit is None else key.rate_limit


def _refused(key: Principal) -> str:
    return f"{key.key_id}.refused"
