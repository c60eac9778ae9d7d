"""Unpacks the Debian packages that a language needs into .tools/debian, without installing them.

python proto/debian.py LANGUAGE...; a language whose packages are not available is reported and the
exit code is 1. Packages that are installed on the machine are not downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / ".tools" / "debian"
_COMPILER = ("protobuf-compiler", "protobuf-compiler-grpc")
PACKAGES = {
    "java": (
        *_COMPILER,
        "protobuf-compiler-grpc-java-plugin",
        "libgrpc-java",
        "libprotobuf-java",
        "libnetty-java",
        "libperfmark-java",
        "libgoogle-gson-java",
        "libguava-java",
        "libjsr305-java",
        "libgeronimo-annotation-1.3-spec-java",
    ),
    "cpp": (*_COMPILER, "libgrpc++-dev", "libprotobuf-dev"),
    "go": (
        "golang-go",
        "protoc-gen-go",
        "protoc-gen-go-grpc",
        "golang-google-grpc-dev",
        "golang-google-genproto-dev",
        "golang-google-protobuf-dev",
    ),
    "ruby": (*_COMPILER, "ruby", "ruby-grpc", "ruby-googleapis-common-protos-types"),
}


class FetchError(Exception):
    """The packages of a language cannot be downloaded; the sentence says why."""


def main() -> int:
    """Returns 1 if the packages of a language are not available."""
    status = 0
    for language in sys.argv[1:]:
        try:
            fetch(language)
        except FetchError as error:
            print(f"{language}: {error}", file=sys.stderr)
            status = 1
    return status


def fetch(language: str) -> None:
    """Unpacks the packages of a language, once. Raises FetchError."""
    stamp = ROOT / f".{language}"
    if stamp.exists():
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise FetchError("no apt-get on this machine")
    ROOT.mkdir(parents=True, exist_ok=True)
    wanted = missing(PACKAGES[language])
    with tempfile.TemporaryDirectory() as folder:
        if wanted:
            run("apt-get", *lists(), "download", *wanted, folder=folder)
        for package in sorted(Path(folder).glob("*.deb")):
            run("dpkg-deb", "-x", str(package), str(ROOT))
    stamp.touch()


def missing(packages: tuple[str, ...]) -> list[str]:
    """Returns the packages that an install would add, those of the dependencies too."""
    command = ("apt-get", *lists(), "install", "--simulate", "--no-install-recommends")
    try:
        plan = run(*command, *packages)
    except FetchError:
        if lists():
            raise
        # The machine has no lists of packages, or old ones: this folder gets its own.
        for part in ("lists/partial", "cache/archives/partial"):
            (ROOT / "apt" / part).mkdir(parents=True, exist_ok=True)
        run("apt-get", *lists(), "update")
        plan = run("apt-get", *lists(), *command[1:], *packages)
    return [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]


def lists() -> tuple[str, ...]:
    """Returns the options for lists of packages that belong to this folder, if it has some."""
    apt = ROOT / "apt"
    if not apt.exists():
        return ()
    return (f"-oDir::State::lists={apt / 'lists'}", f"-oDir::Cache={apt / 'cache'}")


def run(*command: str, folder: str | None = None) -> str:
    """Returns the output of a command. Raises FetchError."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FetchError(f"{' '.join(command[:1])} failed: {last}")
    return done.stdout


def environment() -> dict[str, str]:
    """Returns the environment in which the unpacked programs and libraries are found."""
    libraries = [str(path) for path in sorted((ROOT / "usr" / "lib").glob("*-linux-gnu"))]
    variables = {
        "PATH": str(ROOT / "usr" / "bin"),
        "LD_LIBRARY_PATH": ":".join(libraries),
    }
    return {
        name: ":".join(part for part in (value, os.environ.get(name, "")) if part)
        for name, value in variables.items()
        if value
    }


if __name__ == "__main__":
    sys.exit(main())
