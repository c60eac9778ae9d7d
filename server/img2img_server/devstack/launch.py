"""Executes a command that dies with its parent: `python launch.py PARENT_PID COMMAND [ARGUMENT…]`.

The bare interpreter runs this file, so it imports the standard library only. Popen's preexec_fn is
no alternative: it must not run in a process with threads, and torch has many.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Makes the kernel kill this process with its parent (Linux only); executes the command."""
    if sys.platform == "linux":
        # SIGKILL: both servers keep their data after it, and a new process may start at once in the
        # same folder.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # The parent is already dead.
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
