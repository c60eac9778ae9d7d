"""The values of the README's `helm install` command render."""

from __future__ import annotations

import shlex

import yaml

from tests.chart_render import helm
from tests.readme import ROOT, blocks


def test_what_the_readme_installs_renders_with_its_own_nats_and_s3() -> None:
    [block] = [block for block in blocks(ROOT / "README.md", "sh") if "helm install" in block.text]
    install, test = block.text.replace("\\\n", " ").strip().splitlines()
    assert shlex.split(test)[:3] == ["helm", "test", "demo"]
    command = shlex.split(install)
    assert command[:4] == ["helm", "install", "demo", "helm/img2img"]
    done = helm(*command[4:])
    assert done.returncode == 0, done.stderr
    workloads = {
        found["metadata"]["name"].removeprefix("demo-img2img-")
        for found in yaml.safe_load_all(done.stdout)
        if found and found["kind"] in ("Deployment", "StatefulSet")
    }
    assert workloads == {"api", "gateway", "worker-default", "nats", "s3"}
