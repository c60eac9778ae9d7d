"""Job.warning: full sentences for people, as one text."""

from __future__ import annotations


def join_warnings(*warnings: str) -> str:
    """Joins warnings to one text: every sentence once, in order, separated by a space."""
    return " ".join(dict.fromkeys(filter(None, warnings)))
