"""The server code of another commit, for the same benchmark."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@contextmanager
def checked_out(commit: str) -> Iterator[dict[str, Any]]:
    """Checks a commit out into a temporary folder, with the benchmarks of this one.

    Yields the arguments of a subprocess that uses its code.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        command = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*command, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            (tree / "benchmarks" / "fleet").mkdir(exist_ok=True)
            for file in (ROOT / "benchmarks" / "fleet").glob("*.py"):
                (tree / "benchmarks" / "fleet" / file.name).write_bytes(file.read_bytes())
            paths = [tree / "server", tree / "client", tree / "proto" / "gen", tree]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
            yield {"cwd": tree, "env": environment}
        finally:
            subprocess.run([*command, "remove", "--force", str(tree)], check=True)
