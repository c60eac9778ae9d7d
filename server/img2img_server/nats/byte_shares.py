"""Shares a number of bytes between owners, so that no owner can use all of it."""

from __future__ import annotations

import asyncio
from collections import Counter, deque


class ByteShares:
    """A budget of bytes that several owners use at a time.

    An owner may hold as many bytes as are free: one owner gets half of the budget, two get a third
    each. An owner that holds nothing always gets its first bytes.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[int, asyncio.Future[None]]]] = {}
        self.held = 0

    def try_hold(self, owner: str, size: int) -> bool:
        """Holds bytes if the owner's share allows it and no earlier caller of the owner waits."""
        return owner not in self._waiting and self._take(owner, size)

    async def hold(self, owner: str, size: int) -> None:
        """Holds bytes as soon as the owner's share allows it, in the order of the calls."""
        if self.try_hold(owner, size):
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append((size, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release(owner, size)
            raise

    def adjust(self, owner: str, change: int) -> None:
        """Holds more or fewer bytes at once, without regard to the owner's share."""
        self._held[owner] += change
        self.held += change
        if not self._held[owner]:
            del self._held[owner]
        if change < 0:
            self._grant()

    def release(self, owner: str, size: int) -> None:
        """Releases bytes that were held."""
        self.adjust(owner, -size)

    def _take(self, owner: str, size: int) -> bool:
        mine = self._held[owner]
        if mine and mine + size > self._total - self.held - size:
            return False
        self.adjust(owner, size)
        return True

    def _grant(self) -> None:
        """Grants the waiting requests that the shares allow, the oldest of each owner first."""
        for owner, queue in list(self._waiting.items()):
            while queue:
                size, granted = queue[0]
                if not granted.done():
                    if not self._take(owner, size):
                        break
                    granted.set_result(None)
                queue.popleft()
            if not queue:
                del self._waiting[owner]
