"""The dependencies of an installed package."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Returns the names of all packages that `name[extras]` installs, without itself."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(name), extras)]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        for line in metadata.requires(current[0]) or []:
            requirement = Requirement(line)
            environments = [{"extra": extra} for extra in current[1] or {""}]
            if requirement.marker and not any(map(requirement.marker.evaluate, environments)):
                continue
            waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {each for each, _ in found} - {canonicalize_name(name)}
