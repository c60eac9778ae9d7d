"""The seam between the worker and what judges pictures (HTTP contract, section 12)."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

import numpy as np

from img2img_server.imaging.base import Pixels


class SafetyChecker(Protocol):
    """Scores finished pictures. May be called from several threads."""

    async def warm_up(self) -> None:
        """Loads what the first check would have to wait for.

        Raises:
            SafetyCheckError: it cannot run on this machine.
        """
        ...

    @property
    def turn(self) -> AbstractAsyncContextManager[None]:
        """To be entered for a check, before it is given a thread: waiting there holds none."""
        ...

    def check(self, pixels: Pixels) -> float:
        """Returns 0 (safe for work) to 1 (not); computes and blocks.

        Args:
            pixels: height x width x 3, RGB.

        Raises:
            SafetyCheckError: it cannot run; the job must fail.
        """
        ...


def blank(pixels: Pixels) -> Pixels:
    """The black picture of the same size that takes a flagged one's place."""
    return np.zeros(pixels.shape, np.uint8)
