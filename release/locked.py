"""The packages of requirements/: what each role installs, with the hashes of the files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.commands import ROOT

# The platform of the images. Packages for other platforms are left out.
PLATFORM: Final = {
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "platform_python_implementation": "CPython",
    "implementation_name": "cpython",
    "python_version": "3.11",
    "python_full_version": "3.11.0",
}
_INCLUDED: Final = re.compile(r"^-r (\S+)$", re.MULTILINE)
_ENTRY: Final = re.compile(
    r"^(?P<requirement>[\w.-]+==[^\\\n]+?) \\\n(?P<hashes>(?:    --hash.*\n?)+)", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Locked:
    """A package with its canonical name, for the platform of the images."""

    name: str
    version: str
    hashes: tuple[str, ...]


def locked(*files: str) -> dict[str, Locked]:
    """Returns the packages of files in requirements/ and of those that they include, by name."""
    found: dict[str, Locked] = {}
    for file in files:
        text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
        found |= locked(*_INCLUDED.findall(text))
        for entry in _ENTRY.finditer(text):
            requirement = Requirement(entry["requirement"])
            if requirement.marker is None or requirement.marker.evaluate(PLATFORM):
                name = canonicalize_name(requirement.name)
                version = str(requirement.specifier).removeprefix("==")
                hashes = tuple(re.findall(r"--hash=sha256:(\w+)", entry["hashes"]))
                found[name] = Locked(name, version, hashes)
    return found
