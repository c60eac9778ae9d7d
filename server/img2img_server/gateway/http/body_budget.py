"""How much of request bodies one gateway holds at a time, before anybody knows whose they are."""

from __future__ import annotations


class BodyBudget:
    """Bytes of bodies that are held now by all requests together, at most `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    def take(self, size: int) -> bool:
        """Counts so many bytes more, or says that there is no room for them."""
        if self._held + size > self._most:
            return False
        self._held += size
        return True

    def give_back(self, size: int) -> None:
        """Counts what was taken as no longer held."""
        self._held -= size


class Body:
    """The part of one request."""

    def __init__(self, bodies: BodyBudget) -> None:
        self._bodies = bodies
        self._size = 0

    def take(self, size: int) -> bool:
        """Counts so many bytes more, or says that there is no room for them."""
        taken = self._bodies.take(size)
        self._size += size if taken else 0
        return taken

    def forget(self) -> None:
        """Nothing of it is held any more. Fine a second time."""
        self._bodies.give_back(self._size)
        self._size = 0
