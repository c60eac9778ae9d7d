"""Runs a role whose clock can be off: `python -m benchmarks.chaos.role api|worker`.

`CHAOS_CLOCK_SECONDS` is added to the wall clock of the process from the start on, and
`CHAOS_CLOCK_STEP` from SIGUSR1 on. The worker has the fake engine.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import minio.time

_real, _real_ns, _utc = time.time, time.time_ns, minio.time.utcnow
_shift = float(os.environ.get("CHAOS_CLOCK_SECONDS", "0"))


def step(*_: object) -> None:
    """Sets the clock off, as a wrong time server would."""
    global _shift
    _shift += float(os.environ.get("CHAOS_CLOCK_STEP", "0"))


def main() -> None:
    """Replaces the clock, then imports and runs the role."""
    time.time = lambda: _real() + _shift
    time.time_ns = lambda: _real_ns() + int(_shift * 1e9)
    minio.time.utcnow = lambda: _utc() + timedelta(seconds=_shift)
    signal.signal(signal.SIGUSR1, step)
    if sys.argv[1] == "worker":
        from benchmarks.fake_worker import serve
        from img2img_server.lifecycle import run_role

        run_role(serve)
    else:
        from img2img_server.__main__ import main as server

        server()


if __name__ == "__main__":
    main()
