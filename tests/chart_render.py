"""Renders the chart with helm. `make test` and `make chart` install helm into .tools/."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "img2img"
HELM = ROOT / ".tools" / "helm"
SETS = sorted(path.name.removesuffix("-values.yaml") for path in CHART.glob("ci/*-values.yaml"))
RELEASE = NAMESPACE = "demo"

PROGRAMS = {"img2img-server", "img2img", "nats-server", "weed"}

Object = dict[str, Any]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `helm template` on the chart with these arguments."""
    if not HELM.exists():
        pytest.skip("helm is not in .tools/: run `make chart` once")
    command = [str(HELM), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def value_set(name: str) -> str:
    """Returns the file of a value set."""
    return str(CHART / "ci" / f"{name}-values.yaml")


@cache
def render(name: str, *arguments: str) -> list[Object]:
    """Returns the rendered objects of a value set, by kind and name. Do not change them."""
    done = helm("--values", value_set(name), *arguments)
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))


def refusal(*arguments: str, name: str = "default") -> str:
    """Returns helm's message about invalid values."""
    done = helm("--values", value_set(name), *arguments)
    assert done.returncode != 0, "helm took it"
    return done.stderr


@dataclass(frozen=True)
class Pod:
    """A pod of a rendered object."""

    name: str
    labels: dict[str, str]
    spec: Object

    def containers(self) -> list[Object]:
        """Returns the init containers, then the containers, without those of the operator."""
        return [each for each in self.all_containers() if PROGRAMS & set(each.get("command", []))]

    def all_containers(self) -> list[Object]:
        """Returns the init containers, then the containers."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(objects: list[Object]) -> Iterator[Pod]:
    """Returns every pod that the objects would start."""
    for each in objects:
        if each["kind"] in ("Deployment", "StatefulSet"):
            template = each["spec"]["template"]
            yield Pod(each["metadata"]["name"], template["metadata"]["labels"], template["spec"])
        elif each["kind"] == "Pod":
            yield Pod(each["metadata"]["name"], each["metadata"]["labels"], each["spec"])


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """Returns the objects of a kind by name."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def environment(objects: list[Object], container: Object) -> dict[str, Any]:
    """Returns the environment of a container: texts, or their sources."""
    found: dict[str, Any] = {}
    for source in container.get("envFrom", []):
        name = source.get("configMapRef", {}).get("name")
        found |= of_kind(objects, "ConfigMap").get(name, {}).get("data", {})
    for each in container.get("env", []):
        found[each["name"]] = each.get("value", each.get("valueFrom"))
    return found
