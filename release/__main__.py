"""Builds what a release publishes and checks it: `make dist`.

    python -m release [--output dist] [--skip-installs] [--skip-image | --full]

Every step that cannot run on this machine is listed as skipped at the end, with its reason.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Final

from release import chart, identity, image, python
from release.commands import EPOCH, ROOT, TOOLS, ReleaseError, changed_files, run, source_epoch
from release.notes import notes

DIST: Final = ROOT / "dist"
SUMS: Final = "SHA256SUMS"
DIGESTS: Final = "IMAGE_DIGESTS"
SBOM_PYTHON: Final = TOOLS / "dist" / "bin" / "python"


class Steps:
    """Prints each step with its time."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def done(self, text: str) -> None:
        now = time.monotonic()
        print(f"{now - self._began:5.1f} s  {text}", flush=True)
        self._began = now


def checked_version() -> str:
    """Returns the version. Raises ReleaseError if files disagree about version or address."""
    if found := identity.faults():
        raise ReleaseError("\n".join(found))
    return identity.VERSION.read(ROOT)


def make_empty(target: Path) -> None:
    """Creates the folder or deletes its files. Raises ReleaseError if they are not of a release."""
    ours = target == DIST or (target / SUMS).exists()
    if target.exists() and not ours and any(target.iterdir()):
        raise ReleaseError(f"{target} has files, but no {SUMS}: choose another --output")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)


def write_sums(target: Path) -> None:
    """Writes the SHA-256 of every file in the format of sha256sum."""
    files = sorted(path for path in target.iterdir() if path.name != SUMS)
    lines = [f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (target / SUMS).write_text("".join(lines), encoding="utf-8")


def build_image(target: Path, version: str) -> str:
    """Writes the image of api and gateway, and the digest of its manifest, which pushes keep.
    Returns its Debian packages.
    """
    name = f"{image.REPOSITORY}-{version}-slim.oci.tar"
    reference = f"{image.REPOSITORY}:{version}-slim"
    image.make_base(new=True)
    image.build("slim", f"localhost/{reference}", version)
    digest = image.export(f"localhost/{reference}", target / name, reference)
    pulled = image.pull(target / name)
    image.check(pulled, version)
    (target / DIGESTS).write_text(f"{digest}  {reference}\n", encoding="utf-8")
    return image.debian_packages(pulled)


def build_worker_image(version: str) -> None:
    """Builds the stages of the worker's image and runs its command. Its torch is that of the index
    of this machine, so the image is not written.
    """
    tag = f"localhost/{image.REPOSITORY}:{version}"
    image.make_base(new=False)
    image.build("full", tag, version)
    image.check(tag, version)


def images(
    target: Path, version: str, steps: Steps, chosen: argparse.Namespace
) -> tuple[str, list[str]]:
    """Builds the images that this machine can build. Returns the Debian packages of the first one,
    and what is skipped, with its reason.
    """
    skipped, packages = [], ""
    reason = "--skip-image" if chosen.skip_image else image.missing()
    if reason:
        skipped.append(f"the image of api and gateway: {reason}")
    else:
        packages = build_image(target, version)
        steps.done("image of api and gateway, its command run from the archive")
    if not reason and chosen.full:
        build_worker_image(version)
        steps.done("stages of the worker's image, its command run")
        reason = "its stages were built with this machine's torch, which is not that of a release"
    skipped.append(f"the image of the worker: {reason or '--full builds its stages'}")
    return packages, skipped


def build(target: Path, chosen: argparse.Namespace) -> list[str]:
    """Builds everything into a new folder. Returns what was skipped."""
    version, epoch, steps = checked_version(), source_epoch(), Steps()
    make_empty(target)
    python.build(target, epoch)
    steps.done("source distributions and wheels")
    python.check_sources(target, epoch)
    steps.done("the source distributions build the same wheels")
    if not chosen.skip_installs:
        python.check_installs(target)
        steps.done("the wheels work in environments of their own")
    package = chart.build(target, epoch)
    chart.check(package)
    steps.done("chart package, linted and rendered")
    packages, skipped = images(target, version, steps, chosen)
    command = (SBOM_PYTHON, "-m", "release.sbom", target, sys.executable)
    run(*command, given=packages, **{EPOCH: str(epoch)})
    steps.done("bills of materials, valid by the schema of CycloneDX")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (target / "NOTES.md").write_text(notes(changelog, version), encoding="utf-8")
    write_sums(target)
    steps.done(f"notes and {SUMS}")
    return skipped + ["the wheels in empty environments: --skip-installs"] * chosen.skip_installs


def warnings() -> list[str]:
    """Returns what keeps the files from being a release."""
    found = []
    if changed := changed_files():
        found.append(f"{len(changed)} files differ from the commit: {', '.join(changed[:5])}")
    if not identity.is_published():
        address = identity.REPOSITORY.read(ROOT)
        found.append(f"the address of the project is a placeholder, {address}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DIST)
    parser.add_argument("--skip-installs", action="store_true", help="install no wheel")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--skip-image", action="store_true", help="build no image")
    which.add_argument("--full", action="store_true", help="build the worker's image, too")
    chosen = parser.parse_args()
    try:
        skipped = build(chosen.output.absolute(), chosen)
    except ReleaseError as error:
        print(f"make dist: {error}", file=sys.stderr)
        return 1
    for path in sorted(chosen.output.iterdir()):
        print(f"{path.stat().st_size:12,}  {path.name}")
    for each in skipped:
        print(f"skipped: {each}")
    for warning in warnings():
        print(f"warning: not a release: {warning}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
