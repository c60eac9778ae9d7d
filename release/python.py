"""Source distributions and wheels of the client and the server, and what proves that they work."""

from __future__ import annotations

import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Final

from release.commands import EPOCH, ROOT, ReleaseError, run

# The distributions and their folders.
DISTRIBUTIONS: Final = {"img2img_client": ROOT / "client", "img2img_service": ROOT}
PIP: Final = ("-m", "pip", "--disable-pip-version-check", "--quiet", "install")
# Commands that run without a server, by the distribution that has them.
CLIENT_COMMANDS: Final = (("img2img", "--version"), ("img2img", "generate", "--help"))
SERVER_COMMANDS: Final = (("img2img-server", "--version"), ("img2img-server", "keys", "--tenant=t"))


def build(target: Path, epoch: int) -> None:
    """Writes both distributions into a folder, each as a source distribution and a wheel."""
    for folder in DISTRIBUTIONS.values():
        _hatch(folder, target, epoch, "sdist", "wheel")


def _hatch(folder: Path, target: Path, epoch: int, *kinds: str) -> None:
    options = [f"--target={kind}" for kind in kinds]
    command = (sys.executable, "-m", "hatchling", "build", "--directory", target, *options)
    run(*command, cwd=folder, **{EPOCH: str(epoch)})


def check_sources(target: Path, epoch: int) -> None:
    """Builds each wheel again from its source distribution. Raises ReleaseError if it differs."""
    for name in DISTRIBUTIONS:
        (archive,), (wheel,) = target.glob(f"{name}-*.tar.gz"), target.glob(f"{name}-*.whl")
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(archive) as files:
                files.extractall(folder, filter="data")
            (source,) = Path(folder).iterdir()
            _hatch(source, Path(folder, "again"), epoch, "wheel")
            again = Path(folder, "again", wheel.name)
            if again.read_bytes() != wheel.read_bytes():
                raise ReleaseError(f"{archive.name} builds another wheel than {wheel.name}")


def check_installs(target: Path) -> None:
    """Installs the wheels into environments that have nothing else, and runs their commands.

    They get the locked packages: the client its own, the server those of api and gateway.
    """
    (client,), (server,) = target.glob("img2img_client-*.whl"), target.glob("img2img_service-*.whl")
    with tempfile.TemporaryDirectory() as folder:
        _install(Path(folder, "client"), "client.txt", [client], CLIENT_COMMANDS)
        commands = CLIENT_COMMANDS + SERVER_COMMANDS
        _install(Path(folder, "server"), "server.txt", [client, server], commands)


def _install(
    folder: Path, locked: str, wheels: list[Path], commands: tuple[tuple[str, ...], ...]
) -> None:
    """Creates an environment with the wheels and runs their commands in it."""
    venv.create(folder, with_pip=True)
    python, requirements = folder / "bin" / "python", ROOT / "requirements" / locked
    run(python, *PIP, "--require-hashes", "--no-deps", "--requirement", requirements)
    run(python, *PIP, "--no-deps", "--no-index", *wheels)
    run(python, "-m", "pip", "--disable-pip-version-check", "check")
    for name, *arguments in commands:
        # In a folder without our sources, and without a variable that leads to them.
        run(folder / "bin" / name, *arguments, cwd=folder, PYTHONPATH="")
