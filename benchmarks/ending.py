"""The end of a benchmark."""

from __future__ import annotations

import signal
import sys


def end_on_sigterm() -> None:
    """Lets a SIGTERM leave no process behind. For the main thread."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends two
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
