"""Shares a bounded resource of this process between tenants: bytes, processes, open connections.

A request waits in asyncio for its share, before it occupies a thread, a process or memory.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from img2img_server.errors import ServerBusyError
from img2img_server.telemetry import (
    BUDGET_REFUSED,
    BUDGET_TOTAL,
    BUDGET_USED,
    BUDGET_WAITING,
    count_from_zero,
)

LEAST_RETRY_SECONDS: Final = 1.0
MOST_RETRY_SECONDS: Final = 30.0


class Share:
    """A part of a budget that a tenant holds until `release` or the end of the `with` block."""

    def __init__(self, budget: Budget, tenant: str, amount: int) -> None:
        self._budget = budget
        self._tenant = tenant
        self.amount = amount

    def resize(self, amount: int) -> None:
        """Changes the amount at once.

        Raises:
            ServerBusyError: The larger amount is not free now.
        """
        self._budget._resize(self, amount)

    def release(self) -> None:
        """Gives the share back. A second call has no effect."""
        self.resize(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(eq=False, slots=True)
class _Waiter:
    amount: int
    granted: asyncio.Future[None]
    since: float = field(default_factory=time.monotonic)


class Budget:
    """An amount of a resource that tenants share fairly.

    - A tenant holds `tenant_most` of `total` at most, also when the rest is idle: so a tenant
      that holds nothing finds room at once, unless several other tenants hold all of it.
    - With `leaves_free`, what a tenant holds never exceeds what was free before it took the last
      part. One tenant gets about half of `total`, two get about a third each, and so on: so there
      is always room left for another tenant.
    - Below that, a tenant may use what others leave idle. When an amount becomes free, the waiting
      tenant that holds least is served next; requests of one tenant are served in their order.
    - A request waits `wait_seconds` at most, and `most_waiting` requests of a tenant wait at most.

    Use it in one event loop.

    Args:
        name: The label of the metrics and the resource in error messages, such as "image bytes".
        wait_seconds: None: requests wait without limit.
    """

    def __init__(
        self,
        name: str,
        total: int,
        tenant_most: int | None = None,
        *,
        leaves_free: bool = False,
        wait_seconds: float | None = 0.0,
        most_waiting: int = 1000,
    ) -> None:
        self.name = name
        self.total = total
        self.tenant_most = total if tenant_most is None else min(tenant_most, total)
        self._leaves_free = leaves_free
        self._wait_seconds = wait_seconds
        self._most_waiting = most_waiting
        self._used: Counter[str] = Counter()
        self._sum = 0
        self._waiting: dict[str, deque[_Waiter]] = {}
        BUDGET_TOTAL.labels(name).set(total)
        count_from_zero(BUDGET_REFUSED, [name], ("full", "wait", "size"))

    def used(self, tenant: str | None = None) -> int:
        """Returns the amount that a tenant holds, or all tenants together."""
        return self._sum if tenant is None else self._used[tenant]

    def waiting(self, tenant: str | None = None) -> int:
        """Returns the number of requests that wait, of a tenant or of all."""
        if tenant is not None:
            return len(self._waiting.get(tenant, ()))
        return sum(map(len, self._waiting.values()))

    def try_take(self, tenant: str, amount: int) -> Share:
        """Returns a share at once.

        Raises:
            ServerBusyError: The amount is not free now, or other requests are served before.
        """
        waiter = self._enqueue(tenant, amount)
        if not waiter.granted.done():
            self._forget(tenant, waiter)
            raise self._refusal(tenant, "full")
        return Share(self, tenant, amount)

    async def take(self, tenant: str, amount: int) -> Share:
        """Returns a share once it is free and it is the tenant's turn.

        Raises:
            ServerBusyError: Too many requests of the tenant wait already, the share does not become
                free in time, or it is larger than a tenant may hold.
        """
        if amount > self.tenant_most:
            raise self._refusal(tenant, "size")
        if self._wait_seconds == 0 or self.waiting(tenant) >= self._most_waiting:
            return self.try_take(tenant, amount)
        waiter = self._enqueue(tenant, amount)
        try:
            async with asyncio.timeout(self._wait_seconds):
                await waiter.granted
        except BaseException as error:
            if waiter.granted.done() and not waiter.granted.cancelled():
                # The share was granted in the moment in which the wait ended.
                Share(self, tenant, amount).release()
            else:
                self._forget(tenant, waiter)
                self._grant()
            if isinstance(error, TimeoutError):
                raise self._refusal(tenant, "wait") from None
            raise
        return Share(self, tenant, amount)

    def _enqueue(self, tenant: str, amount: int) -> _Waiter:
        waiter = _Waiter(amount, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(tenant, deque()).append(waiter)
        BUDGET_WAITING.labels(self.name).inc()
        self._grant()
        return waiter

    def _fits(self, tenant: str, amount: int) -> bool:
        held, free = self._used[tenant], self.total - self._sum
        if self._leaves_free and held + amount > free:
            return False
        return amount <= free and held + amount <= self.tenant_most

    def _is_due(self, tenant: str, amount: int) -> bool:
        """Returns whether the tenant has a right to the amount once it is free."""
        held = self._used[tenant]
        return held + amount <= self.tenant_most and not (self._leaves_free and held)

    def _add(self, tenant: str, amount: int) -> None:
        self._sum += amount
        self._used[tenant] += amount
        if not self._used[tenant]:
            del self._used[tenant]
        BUDGET_USED.labels(self.name).set(self._sum)

    def _resize(self, share: Share, amount: int) -> None:
        tenant, more = share._tenant, amount - share.amount
        if more > 0 and not self._fits(tenant, more):
            raise self._refusal(tenant, "full")
        self._add(tenant, more)
        share.amount = amount
        if more < 0:
            self._grant()

    def _grant(self) -> None:
        """Serves waiting requests as far as there is room."""
        while chosen := next(self._grantable(), None):
            tenant, waiter = chosen
            self._forget(tenant, waiter)
            if not waiter.granted.cancelled():  # Otherwise the caller has given up.
                self._add(tenant, waiter.amount)
                waiter.granted.set_result(None)

    def _grantable(self) -> Iterator[tuple[str, _Waiter]]:
        """Yields the requests that can be served now, the next one first.

        The first request of the tenant that holds least is next. If it does not fit yet, only
        tenants that hold nothing may pass it: otherwise small requests could keep it waiting.
        """
        heads = ((tenant, queue[0]) for tenant, queue in self._waiting.items())
        is_blocked = False
        for tenant, waiter in sorted(heads, key=lambda head: (self._used[head[0]], head[1].since)):
            if is_blocked and self._used[tenant]:
                return
            if self._fits(tenant, waiter.amount):
                yield tenant, waiter
            elif self._is_due(tenant, waiter.amount):
                is_blocked = True

    def _forget(self, tenant: str, waiter: _Waiter) -> None:
        queue = self._waiting.get(tenant, deque())
        if waiter not in queue:
            return
        queue.remove(waiter)
        if not queue:
            del self._waiting[tenant]
        BUDGET_WAITING.labels(self.name).dec()

    def _refusal(self, tenant: str, why: str) -> ServerBusyError:
        """Returns the error. A client may retry after the time that the tenant's oldest waiting
        request has waited.
        """
        BUDGET_REFUSED.labels(self.name, why).inc()
        queue = self._waiting.get(tenant)
        waited = time.monotonic() - queue[0].since if queue else (self._wait_seconds or 0.0)
        seconds = min(max(waited, LEAST_RETRY_SECONDS), MOST_RETRY_SECONDS)
        return ServerBusyError(self.name, retry_seconds=round(seconds, 1))
