"""Start-time fair queueing: counts the work of each tenant, so that no tenant delays the others."""

from __future__ import annotations

from collections.abc import Collection


class FairShare:
    """The work of the tenants that have rows, and of idle tenants that have had more than the
    others.
    """

    def __init__(self) -> None:
        self._work: dict[str, float] = {}

    def __getitem__(self, tenant: str) -> float:
        return self._work[tenant]

    def add(self, tenant: str, work: float) -> None:
        """Counts work of an active tenant."""
        self._work[tenant] += work

    def activate(self, tenant: str, present: Collection[str]) -> None:
        """Raises a returning tenant to the level of the others, because idle time earns no credit.

        Args:
            present: the tenants that have rows.
        """
        if tenant not in present:
            least = min((self._work[other] for other in present), default=0.0)
            self._work[tenant] = max(self._work.get(tenant, 0.0), least)

    def evict(self, present: Collection[str]) -> None:
        """Drops idle tenants that do not owe work."""
        least = min((self._work[tenant] for tenant in present), default=float("inf"))
        self._work = {
            tenant: work for tenant, work in self._work.items() if tenant in present or work > least
        }

    def copy(self) -> FairShare:
        """Returns an independent copy."""
        other = FairShare()
        other._work = dict(self._work)
        return other
