"""Checks the chart with other tools: helm's lint, Kubernetes' own schemas, checkov.

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
# The oldest Kubernetes version that Chart.yaml allows, and the newest one that the schemas have.
KUBERNETES = ("1.31.0", "1.37.0")


def main() -> int:
    """Returns 0; the first finding ends the program with 1."""
    sets = sorted(CHART.glob("ci/*-values.yaml"))
    lint(sets)
    with tempfile.TemporaryDirectory() as folder:
        manifests = [render(values, Path(folder)) for values in sets]
        validate(manifests)
        scan(Path(folder))
    return 0


def lint(sets: list[Path]) -> None:
    """Runs helm lint --strict on each value set."""
    for values in sets:
        run(TOOLS / "helm", "lint", "--strict", "--quiet", CHART, "--values", values)
    print(f"helm lint --strict: {len(sets)} value sets")


def render(values: Path, folder: Path) -> Path:
    """Writes the manifests that the chart renders for a value set."""
    target = folder / values.name
    command = ("template", "img2img", CHART, "--namespace", "img2img", "--values", values)
    target.write_text(run(TOOLS / "helm", *command), encoding="utf-8")
    return target


def validate(manifests: list[Path]) -> None:
    """Validates the manifests against two Kubernetes versions; prints kinds without a schema."""
    program = TOOLS / "checks" / "bin" / "kubernetes-validate"
    for version in KUBERNETES:
        said = run(program, "--strict", "--kubernetes-version", version, *manifests)
        unknown = set(re.findall(r"find schema for kind (\w+)", said))
        print(f"kubernetes-validate {version}: {len(manifests)} renders, no findings")
        if unknown:
            print(f"  not validated, custom resources: {', '.join(sorted(unknown))}")


def scan(folder: Path) -> None:
    """Runs checkov without the checks that helm/checkov.yaml excludes with a reason."""
    config = ROOT / "helm" / "checkov.yaml"
    run(TOOLS / "checks" / "bin" / "checkov", "--config-file", config, "--directory", folder)
    skipped = yaml.safe_load(config.read_text(encoding="utf-8"))["skip-check"]
    print(f"checkov: no findings; {', '.join(skipped)} are explained in {config.relative_to(ROOT)}")


def run(*command: object) -> str:
    """Returns both outputs of a command; ends the program with them if it fails."""
    done = subprocess.run(  # noqa: S603
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout)
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
