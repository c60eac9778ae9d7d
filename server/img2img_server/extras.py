"""The command that installs an extra of the package."""

from __future__ import annotations


def install_command(extra: str) -> str:
    """Returns the end of a message. A registry has no release, so it installs from a clone."""
    return f"in a clone of the repository, run: pip install ./client '.[{extra}]'"
