"""Safety checkers that look at no picture."""

from __future__ import annotations

from img2img_server.errors import SafetyCheckError
from img2img_server.images.base import Pixels


class FixedScore:
    """Gives every picture the same score; off is FixedScore(0.0)."""

    def __init__(self, score: float) -> None:
        self.score = score
        self.checked: list[Pixels] = []

    async def warm_up(self) -> None:
        """Nothing to load."""

    def check(self, pixels: Pixels) -> float:
        self.checked.append(pixels)
        return self.score


class BrokenChecker:
    """Cannot run."""

    async def warm_up(self) -> None:
        raise SafetyCheckError("the safety check cannot run")

    def check(self, pixels: Pixels) -> float:
        raise SafetyCheckError("the safety check cannot run")
