"""Runs the commands of a release and knows its folders."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
TOOLS: Final = ROOT / ".tools"
EPOCH: Final = "SOURCE_DATE_EPOCH"


class ReleaseError(Exception):
    """A step of the release failed; the sentence says which one and why."""


def run(*command: object, cwd: Path = ROOT, given: str = "", **environment: str) -> str:
    """Returns both outputs of a command. Raises ReleaseError with them if it fails.

    `given`: its standard input.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        said = " ".join(map(str, command))
        raise ReleaseError(f"failed with status {done.returncode}: {said}\n{done.stdout}")
    return done.stdout


def source_epoch() -> int:
    """Returns the time that all files get: SOURCE_DATE_EPOCH, or that of the commit."""
    if chosen := os.environ.get(EPOCH):
        return int(chosen)
    try:
        return int(run("git", "log", "-1", "--format=%ct"))
    except (OSError, ReleaseError) as error:
        raise ReleaseError(f"this is no git clone, so set {EPOCH}: {error}") from error


def changed_files() -> list[str]:
    """Returns the files that differ from the commit; empty outside of a git clone."""
    try:
        return run("git", "status", "--porcelain").splitlines()
    except (OSError, ReleaseError):
        return []
