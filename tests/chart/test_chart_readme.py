"""The values and the `helm install` commands of the pages render."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from tests.chart_render import helm, value_set
from tests.readme import ROOT, blocks


@pytest.mark.parametrize(
    "page", ["README.md", "docs/deploy-kubernetes.md", "helm/img2img/README.md"]
)
def test_what_a_page_installs_renders_with_its_own_nats_and_s3(page: str) -> None:
    [block] = [block for block in blocks(ROOT / page, "sh") if "helm install" in block.text]
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


PAGES = ["docs/deploy-kubernetes.md", "docs/deploy-minio.md", "docs/gpus-on-kubernetes.md"]
VALUES = [
    (page, number)
    for page in (*PAGES, "helm/img2img/README.md")
    for number, block in enumerate(blocks(ROOT / page, "yaml"))
    if yaml.safe_load(block.text).keys() & {"workers", "s3"}
]


@pytest.mark.parametrize(("page", "number"), VALUES)
def test_the_values_of_a_page_render(page: str, number: int, tmp_path: Path) -> None:
    block = blocks(ROOT / page, "yaml")[number]
    file = tmp_path / "values.yaml"
    file.write_text(block.text, encoding="utf-8")
    done = helm("--values", value_set("default"), "--values", str(file))
    assert done.returncode == 0, done.stderr
    values = yaml.safe_load(block.text)
    names = {found["metadata"]["name"] for found in yaml.safe_load_all(done.stdout) if found}
    for pool in (name for name, value in values.get("workers", {}).items() if value):
        assert f"demo-img2img-worker-{pool}" in names
