"""The dependencies of an installed package, and an environment that has nothing else."""

from __future__ import annotations

import zipfile
from importlib import metadata
from pathlib import Path

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


def install_without_index(wheel: zipfile.ZipFile, name: str, folder: Path) -> dict[str, int]:
    """Installs the wheel of a distribution and links the files of its dependencies into a folder.

    The dependencies are those of this environment, so no package index is needed. Returns the bytes
    of each distribution; files outside site-packages, such as commands, are left out.
    """
    wheel.extractall(folder)
    sizes = {name: sum(entry.file_size for entry in wheel.infolist())}
    for package in closure(name):
        sizes[package] = 0
        for file in metadata.files(package) or []:
            source, target = Path(str(file.locate())), folder / str(file)
            if ".." in file.parts or not source.exists():
                continue
            sizes[package] += source.stat().st_size
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    return sizes
