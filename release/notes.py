"""The notes of a release: its part of CHANGELOG.md."""

from __future__ import annotations

import re

from release.commands import ReleaseError


def notes(changelog: str, version: str) -> str:
    """Returns the part about a version, without its heading. Raises ReleaseError without one."""
    parts = re.split(r"^## ", changelog, flags=re.MULTILINE)
    for part in parts[1:]:
        heading, _, text = part.partition("\n")
        if heading.split()[0].strip("[]") == version:
            return text.strip() + "\n"
    raise ReleaseError(f"CHANGELOG.md has no part about version {version}")
