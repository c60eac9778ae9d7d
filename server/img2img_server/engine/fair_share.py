"""How much work each tenant has had, so that nobody's many requests push out another's few."""

from __future__ import annotations

from collections.abc import Collection


class FairShare:
    """Work by tenant, of those who have rows and of those who would come back with a debt."""

    def __init__(self) -> None:
        self._work: dict[str, float] = {}

    def __getitem__(self, tenant: str) -> float:
        return self._work[tenant]

    def add(self, tenant: str, work: float) -> None:
        """Counts work of a tenant that was welcomed."""
        self._work[tenant] += work

    def activate(self, tenant: str, present: Collection[str]) -> None:
        """A tenant that comes back starts level with the others: idle time earns no credit.

        Args:
            present: those who have rows.
        """
        if tenant not in present:
            least = min((self._work[other] for other in present), default=0.0)
            self._work[tenant] = max(self._work.get(tenant, 0.0), least)

    def evict(self, present: Collection[str]) -> None:
        """Forgets who left, unless he would come back with a debt."""
        least = min((self._work[tenant] for tenant in present), default=float("inf"))
        self._work = {
            tenant: work for tenant, work in self._work.items() if tenant in present or work > least
        }
