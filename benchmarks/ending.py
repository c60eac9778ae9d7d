"""Ends the child processes of a benchmark."""

from __future__ import annotations

import signal
import sys


def end_on_sigterm() -> None:
    """Ends child processes on SIGTERM. Must be called on the main thread."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends two signals.
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
