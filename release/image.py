"""Container images without a registry and without Docker: buildah on a root file system of Debian.

The base is what mmdebstrap makes of Debian 12, with its security updates and its own Python 3.11.
The Dockerfile uses nothing of its base but `python3`, its venv and CA certificates.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from release.commands import ROOT, ReleaseError, run

FOLDER: Final = ROOT / ".img2img" / "image"
STORE: Final = ("--root", FOLDER / "store", "--runroot", FOLDER / "run")
TOOLS: Final = ("buildah", "mmdebstrap")
BASE: Final = "localhost/debian-python:12"
PACKAGES: Final = "ca-certificates,python3,python3-venv"
REPOSITORY: Final = "img2img-service"


def missing(*tools: str) -> str:
    """Returns what this machine needs to build images, or "" if it can."""
    if os.geteuid():
        return "it needs root"
    absent = [tool for tool in (*TOOLS, *tools) if not shutil.which(tool)]
    return f"it needs {' and '.join(absent)} (Debian: apt-get install)" if absent else ""


def buildah(*arguments: object) -> str:
    """Runs buildah with the store of this folder and returns its standard output."""
    command = ["buildah", *map(str, (*STORE, *arguments))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = f"{done.stdout}\n{done.stderr}"
        raise ReleaseError(f"failed with status {done.returncode}: {' '.join(command)}\n{said}")
    return done.stdout.strip()


def make_base(*, new: bool) -> None:
    """Creates the base image if it is missing. `new`: also if it exists, for security updates."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not new and BASE in buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        tree = Path(folder, "base")
        options = ("--mode=root", "--variant=minbase", f"--include={PACKAGES}", "--quiet")
        run("mmdebstrap", *options, "bookworm", tree)
        container = buildah("from", "scratch")
        buildah("copy", "--quiet", container, tree, "/")
        buildah("commit", "--quiet", "--rm", container, BASE)


@contextmanager
def pip_configuration() -> Iterator[list[str]]:
    """Yields the options that pass the pip configuration of this machine to the build.

    It is a build secret; files that it names are mounted.
    """
    listed = run(sys.executable, "-m", "pip", "config", "list")
    values = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    named = re.findall(r"(?:^|[\s/])(/[\w.-]+/[\w.-]+)", " ".join(values.values()))
    folders = {path for path in named if Path(path).exists()}
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        lines = [f"{name} = {value}" for name, value in values.items()]
        file.write("\n".join(["[global]", *lines, ""]))
        file.flush()
        volumes = [f"--volume={folder}:{folder}:ro" for folder in sorted(folders)]
        yield [f"--secret=id=pip,src={file.name}", *volumes]


def build(target: str, tag: str, version: str, base: str = BASE) -> None:
    """Builds a target of the Dockerfile. Its base has no digest, since it is in this store only."""
    arguments = {
        "BASE_IMAGE": base,
        "UNPINNED_BASE": "yes",
        "VERSION": version,
        "REVISION": run("git", "rev-parse", "HEAD").strip(),
        "CREATED": run("git", "log", "-1", "--format=%cI").strip(),
        "TORCH": "-c constraints.txt torch",  # the build that the index of this machine has
    }
    options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
    with pip_configuration() as configuration:
        options += ["--isolation=chroot", "--layers", "--pull=never", *configuration]
        buildah("bud", "--quiet", *options, f"--target={target}", f"--tag={tag}", ROOT)


def export(tag: str, path: Path, reference: str) -> str:
    """Writes an image as an OCI archive and returns the digest of its manifest."""
    buildah("push", "--quiet", "--format=oci", tag, f"oci-archive:{path}:{reference}")
    with tarfile.open(path) as files:
        index = files.extractfile("index.json")
        assert index is not None, f"{path.name} has no index.json"
        (manifest,) = json.load(index)["manifests"]
    return str(manifest["digest"])


def pull(archive: Path) -> str:
    """Reads the image of an OCI archive into the store and returns its id."""
    return buildah("pull", "--quiet", f"oci-archive:{archive}")


def debian_packages(image: str) -> str:
    """Returns the Debian packages of an image: lines of name, version and architecture."""
    container = buildah("from", "--quiet", "--pull=never", image)
    try:
        fields = r"--showformat=${Package}\t${Version}\t${Architecture}\n"
        command = ("dpkg-query", "--show", fields)
        return buildah("run", "--isolation=chroot", container, "--", *command) + "\n"
    finally:
        buildah("rm", container)


def check(image: str, version: str) -> None:
    """Runs the command of an image, as its user. Raises ReleaseError if it has another version."""
    container = buildah("from", "--quiet", "--pull=never", image)
    try:
        command = ("img2img-server", "--version")
        said = buildah("run", "--isolation=chroot", container, "--", *command)
        if version not in said.split():
            raise ReleaseError(f"img2img-server --version prints {said!r} in the image")
    finally:
        buildah("rm", container)
