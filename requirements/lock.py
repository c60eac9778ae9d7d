"""Writes the files in requirements/: every package of each extra with the hashes of its files.

    python requirements/lock.py        needs uv (pip install uv) and the network

The versions are those of constraints.txt. build.txt has the build backend; server.txt, worker.txt,
local.txt, dev.txt and docs.txt each include the one before. client.txt has the packages of the
client alone, dist.txt the tool that writes bills of materials. torch and its CUDA libraries are in
torch.txt only, because a build of torch from another index satisfies the same pin and has other
hashes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent
EXTRAS = ("server", "worker", "local", "dev", "docs")
OWN = ("--no-emit-package", "img2img-service", "--no-emit-package", "img2img-client")
HEAD = "# Written by requirements/lock.py from pyproject.toml and constraints.txt; do not edit.\n"
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def canonical(name: str) -> str:
    """Returns the name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned() -> set[str]:
    """Returns the names in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonical(line.partition("==")[0]) for line in lines if "==" in line}


def compiled(*inputs: str) -> dict[str, str]:
    """Returns what uv resolves: the entry of each package, with its hashes."""
    command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--generate-hashes", "--no-annotate", "--no-header", "--no-config"]
    command += [*OWN, "--constraint", "constraints.txt", *inputs]
    text = subprocess.run(command, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout
    entries = re.split(r"\n(?=[A-Za-z0-9])", text.strip())
    found: dict[str, str] = {}
    for entry in entries:
        name = _NAME.match(entry)
        assert name, entry
        key = canonical(name[0])
        # A package with a version for each platform has several entries.
        found[key] = f"{found[key]}\n{entry}" if key in found else entry
    return found


def compiled_from(*requirements: str) -> dict[str, str]:
    """Returns what uv resolves from requirements."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(requirements))
        file.flush()
        return compiled(file.name)


def write(name: str, entries: dict[str, str], includes: str = "") -> None:
    """Writes one file. `includes`: the file that it continues."""
    first = [f"-r {includes}.txt"] if includes else []
    lines = [HEAD, *first, *(entries[name] for name in sorted(entries)), ""]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")


def main() -> int:
    """Writes all files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    write("build", compiled_from(*project["build-system"]["requires"]))
    write("dist", compiled_from("cyclonedx-bom"))
    write("client", compiled("client/pyproject.toml"))
    torch, known = compiled_from("torch"), pinned() - {"torch"}
    torch = {name: entry for name, entry in torch.items() if name not in known}
    write("torch", torch)
    before, included = dict(torch), ""
    for extra in EXTRAS:
        entries = compiled("pyproject.toml", "--extra", extra)
        # An extra can need a package on more platforms than the extra before.
        new = {n: e for n, e in entries.items() if n not in torch and before.get(n) != e}
        write(extra, new, included)
        before, included = before | entries, extra
    return 0


if __name__ == "__main__":
    sys.exit(main())
