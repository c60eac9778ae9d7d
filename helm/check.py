"""Checks the chart with other people's eyes: helm's lint, Kubernetes' own schemas, checkov.

Run by `make chart` after tests/chart. Ends with 1 at the first finding.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "img2img"
TOOLS = ROOT / ".tools"
# The oldest that Chart.yaml allows and the newest that is known.
KUBERNETES = ("1.31.0", "1.37.0")


def main() -> int:
    """Returns 1 when something was found."""
    sets = sorted(CHART.glob("ci/*-values.yaml"))
    lint(sets)
    with tempfile.TemporaryDirectory() as folder:
        manifests = [render(values, Path(folder)) for values in sets]
        validate(manifests)
        scan(Path(folder))
    return 0


def lint(sets: list[Path]) -> None:
    """helm lint --strict on each value set."""
    for values in sets:
        run(TOOLS / "helm", "lint", "--strict", "--quiet", CHART, "--values", values)
    print(f"helm lint --strict: {len(sets)} value sets")


def render(values: Path, folder: Path) -> Path:
    """Writes what the chart makes of a value set."""
    target = folder / values.name
    command = ("template", "img2img", CHART, "--namespace", "img2img", "--values", values)
    target.write_text(run(TOOLS / "helm", *command), encoding="utf-8")
    return target


def validate(manifests: list[Path]) -> None:
    """Strict validation against two Kubernetes versions; says what has no schema there."""
    program = TOOLS / "checks" / "bin" / "kubernetes-validate"
    for version in KUBERNETES:
        said = run(program, "--strict", "--kubernetes-version", version, *manifests)
        unknown = set(re.findall(r"find schema for kind (\w+)", said))
        print(f"kubernetes-validate {version}: {len(manifests)} renders, no findings")
        if unknown:
            print(f"  not validated, custom resources: {', '.join(sorted(unknown))}")


def scan(folder: Path) -> None:
    """checkov, less what helm/checkov.yaml argues."""
    config = ROOT / "helm" / "checkov.yaml"
    run(TOOLS / "checks" / "bin" / "checkov", "--config-file", config, "--directory", folder)
    skipped = yaml.safe_load(config.read_text(encoding="utf-8"))["skip-check"]
    print(f"checkov: no findings; {', '.join(skipped)} are argued in {config.relative_to(ROOT)}")


def run(*command: object) -> str:
    """Both outputs of a command; ends the program with them when it fails."""
    done = subprocess.run(  # noqa: S603
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout)
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
