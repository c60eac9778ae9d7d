"""Installs the programs prometheus and promtool into .tools/: those on PATH, or those of Debian's
package `prometheus`, which is downloaded and unpacked without being installed. Without apt nothing
is installed, and the tests that need the programs are skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1] / ".tools"
PROGRAMS = ("prometheus", "promtool")


def main() -> None:
    TOOLS.mkdir(exist_ok=True)
    if all(map(shutil.which, PROGRAMS)):
        for name in PROGRAMS:
            (TOOLS / name).unlink(missing_ok=True)
            (TOOLS / name).symlink_to(str(shutil.which(name)))
    elif shutil.which("apt-get") and shutil.which("dpkg-deb"):
        from_package()
    else:
        sys.exit(
            "no prometheus on PATH and no apt-get: the tests of rules in Prometheus are skipped"
        )
    version = subprocess.run([TOOLS / "promtool", "--version"], capture_output=True, text=True)  # noqa: S603
    print(f".tools/promtool is {(version.stdout or version.stderr).splitlines()[0]}")


def from_package() -> None:
    """Downloads the package and unpacks the programs."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["apt-get", "download", "prometheus"],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
        )
        packages = list(Path(folder).glob("*.deb"))
        if done.returncode or not packages:
            sys.exit(f"apt-get download prometheus failed: {done.stderr.strip()}")
        subprocess.run(["dpkg-deb", "-x", packages[0], folder], check=True)  # noqa: S603, S607
        for name in PROGRAMS:
            (TOOLS / name).unlink(missing_ok=True)
            shutil.copy2(Path(folder) / "usr" / "bin" / name, TOOLS / name)


if __name__ == "__main__":
    main()
