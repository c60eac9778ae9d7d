"""The package of the Helm chart, which `helm push` puts into an OCI registry."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from release.commands import ROOT, TOOLS, ReleaseError, run

HELM: Final = TOOLS / "helm"
CHART: Final = ROOT / "helm" / "img2img"


def build(target: Path, epoch: int) -> Path:
    """Packages the chart and returns the file. helm stores the times of files, so all get one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(CHART, Path(folder, CHART.name))
        for path in (copy, *copy.rglob("*")):
            os.utime(path, (epoch, epoch))
        run(HELM, "package", copy, "--destination", target)
    (package,) = target.glob(f"{CHART.name}-*.tgz")
    return package


def check(package: Path) -> None:
    """Lints the package and compares what it renders with what the folder renders."""
    for values in sorted(CHART.glob("ci/*-values.yaml")):
        run(HELM, "lint", "--strict", "--quiet", package, "--values", values)
        options = ("--namespace", "demo", "--values", values)
        # A seed, since passwords of a quickstart are random without one.
        options += ("--set", "quickstart.seed=the-seed-of-the-release")
        if _render(package, *options) != _render(CHART, *options):
            raise ReleaseError(f"{package.name} renders {values.name} differently")


def _render(chart: Path, *options: object) -> str:
    return run(HELM, "template", "demo", chart, *options)
