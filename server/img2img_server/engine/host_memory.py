"""Reads the memory of this machine, or of the container, that a process may still use."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

_CGROUP: Final = Path("/sys/fs/cgroup")


def host_memory(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP
) -> tuple[int, int] | None:
    """Returns the bytes that can still be used, and all bytes; None where they are not known.

    Inside a container its limit counts, if it is lower than the memory of the machine. Cached files
    count as unused.
    """
    try:
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return None
    with suppress(OSError, KeyError, ValueError):
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        stat = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = int(dict(line.split() for line in stat)["inactive_file"])
        free, total = min(free, max(0, limit - used + cached)), min(total, limit)
    return free, total
