"""The threads that torch computes with on a CPU. No torch here: the first word is for before it.

They belong to OpenMP, which keeps them for the thread that called them, as long as that lives. A
step has hundreds of places at which they wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# How often one that waits looks again before it sleeps. OpenMP's own 300,000 last for milliseconds:
# on cores that others use too, those that wait then keep from running those that are waited for,
# and a step takes many times as long. With 3,000 it takes as long as with 300,000 on free cores.
_SPINS = "3000"


def wait_briefly() -> None:
    """Lets threads that wait for each other sleep soon. Before torch is imported, or in vain; what
    the environment says holds."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def apart(work: Callable[[], T]) -> T:
    """Does what loads a model on a thread that ends with it, and its OpenMP threads too.

    While there are more of these than cores, OpenMP lets them all sleep almost at once. Measured on
    two cores, two threads of each of two callers: steps take a tenth longer, decodes a quarter.
    """
    with ThreadPoolExecutor(1, "engine-load") as thread:
        return thread.submit(work).result()
