"""Pushes the chart package to a real OCI registry, by the command of docs/releasing.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from benchmarks.local_stack import free_port
from release import chart
from release.identity import VERSION
from tests.readme import ROOT, blocks

START_SECONDS = 30.0
EPOCH = 1_700_000_000


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Yields the address of an empty registry."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("there is no docker-registry here (Debian: apt-get install docker-registry)")
    address = f"127.0.0.1:{free_port()}"
    settings = tmp_path / "registry.yaml"
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    content = {"version": 0.1, "storage": storage, "http": {"addr": address}}
    settings.write_text(yaml.safe_dump(content))
    with (tmp_path / "registry.log").open("wb") as log:
        process = subprocess.Popen([program, "serve", settings], stdout=log, stderr=log)
    try:
        until_it_answers(process, f"http://{address}/v2/")
        yield address
    finally:
        process.terminate()
        process.wait()


def until_it_answers(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, "the registry ended"
        try:
            with urllib.request.urlopen(url):
                return
        except urllib.error.URLError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_package_is_pushed_and_comes_back_with_the_same_bytes(
    registry: str, tmp_path: Path
) -> None:
    if not chart.HELM.exists():
        pytest.skip("helm is not in .tools/: run `make chart` once")
    version = VERSION.read(ROOT)
    package = chart.build(tmp_path, EPOCH)
    assert package.name == f"img2img-{version}.tgz"
    page = "\n".join(block.text for block in blocks(ROOT / "docs" / "releasing.md", "sh"))
    (push,) = re.findall(r"^helm (push .*)$", page, re.MULTILINE)
    push = push.replace("dist/", f"{tmp_path}/").replace("X.Y.Z", version)
    said = helm(tmp_path, *push.replace("registry.example.com", registry).split(), "--plain-http")
    (digest,) = re.findall(r"^Digest: (sha256:\w+)$", said, re.MULTILINE)
    source = f"oci://{registry}/charts/img2img"
    options = ("--version", version, "--plain-http")
    pulled = tmp_path / "pulled"
    assert digest in helm(tmp_path, "pull", source, *options, "--destination", str(pulled))
    assert (pulled / package.name).read_bytes() == package.read_bytes()
    url = f"http://{registry}/v2/charts/img2img/manifests/{digest}"
    request = urllib.request.Request(
        url, headers={"Accept": "application/vnd.oci.image.manifest.v1+json"}
    )
    with urllib.request.urlopen(request) as response:
        (layer,) = json.load(response)["layers"]
    assert layer["digest"] == f"sha256:{sha256(package.read_bytes()).hexdigest()}"


def helm(folder: Path, *arguments: str) -> str:
    """Runs helm with settings of its own. Returns both outputs, which vary by version."""
    (folder / "pulled").mkdir(exist_ok=True)
    environment = {
        f"HELM_{kind}_HOME": str(folder / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")
    }
    done = subprocess.run(
        [chart.HELM, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
