"""A null takes a default out everywhere, or the schema refuses it with its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from helm.generate import CHART, Comments, is_nullable
from tests.chart_render import Object, helm, of_kind, pods, render, value_set

TEXT = (CHART / "values.yaml").read_text(encoding="utf-8")
COMMENTS, DEFAULTS = Comments(TEXT), yaml.safe_load(TEXT)
# A release has nothing without these values; value sets give them.
GIVEN = {"nats", "s3", "apiKeys", "quickstart"}

Path_ = tuple[str, ...]


def paths(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Yields every value that values.yaml documents, and every group."""
    for key, inner in value.items():
        yield (*path, key), inner
        if isinstance(inner, dict) and not {"$ref", "additionalProperties"} & set(
            COMMENTS.schemas.get((*path, key), {})
        ):
            yield from paths(inner, (*path, key))


ALL = [(path, value) for path, value in paths(DEFAULTS) if path[0] not in GIVEN]
NULLABLE = [path for path, value in ALL if is_nullable(value, path, COMMENTS)]
NEEDED = [path for path, value in ALL if not is_nullable(value, path, COMMENTS)]


def value_of(path: Path_) -> Any:
    """Returns the default of a value if it is a group, otherwise an empty group."""
    value = DEFAULTS
    for key in path:
        value = value[key]
    return value if isinstance(value, dict) else {}


def setting(path: Path_) -> str:
    return "--set=" + ".".join(each.replace(".", "\\.") for each in path) + "=null"


def nulls(objects: Any, where: str = "") -> Iterator[str]:
    """Yields the places of nulls and of Go's words for a missing value."""
    if isinstance(objects, dict):
        for key, value in objects.items():
            yield from nulls(value, f"{where}.{key}")
    elif isinstance(objects, list):
        for number, value in enumerate(objects):
            yield from nulls(value, f"{where}[{number}]")
    elif objects is None or (isinstance(objects, str) and re.search("<nil>|no value", objects)):
        yield where


def rendered(name: str, *given: str) -> list[Object]:
    done = helm("--values", value_set(name), *given)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def test_all_values_that_can_be_taken_out_are_taken_out_at_once() -> None:
    # Switches have a test of their own. An Ingress without a host and a scaler without a metric are
    # refused with a message, see test_chart_values.py.
    kept = {"enabled", "create", "host", "targetCpuPercent", "workers"}
    groups = [path for path in NULLABLE if "enabled" in value_of(path)]
    for depth in (1, 2, 3, 4):
        values = [
            path
            for path in NULLABLE
            if len(path) == depth and not kept & set(path[-1:]) and path not in groups
        ]
        objects = rendered("everything", *map(setting, values))
        assert list(nulls(objects)) == [], depth
        assert {"Deployment", "ConfigMap", "Service"} <= {each["kind"] for each in objects}


def test_a_switch_or_its_group_that_is_taken_out_is_off() -> None:
    switches = [path for path in NULLABLE if path[-1] == "enabled" and path != ("api", "enabled")]
    assert len(switches) > 10
    off = rendered("production", *(setting(path).replace("=null", "=false") for path in switches))
    assert rendered("production", *map(setting, switches)) == off
    groups = {path[:-1] for path in switches} & set(NULLABLE)
    outer = [path for path in groups if not any(path[:n] in groups for n in range(1, len(path)))]
    alone = [path for path in switches if not any(path[: len(each)] == each for each in outer)]
    assert rendered("production", *map(setting, [*sorted(outer), *alone])) == off


def test_every_value_that_templates_cannot_do_without_is_refused_by_its_name() -> None:
    assert NEEDED
    pools = [path for path in NEEDED if path[0] == "workerDefaults"]
    others = [path for path in NEEDED if path[0] != "workerDefaults"]
    for part in (pools, others):
        # A group hides the values in it, so the innermost values are tried.
        inner = [path for path in part if not any(p[: len(path)] == path != p for p in part)]
        said = helm("--values", value_set("default"), *map(setting, inner)).stderr
        missing = [path for path in inner if f"'{path[-1]}'" not in said]
        assert missing == []


def test_a_pool_takes_a_default_of_all_pools_out() -> None:
    given = [
        "--set=workerDefaults.nodeSelector.gpu=l4",
        "--set=workerDefaults.settings.IMG2IMG_DTYPE=bfloat16",
        "--set=workerDefaults.podLabels.tier=gpu",
    ]
    none = [
        *("nodeSelector.gpu", "settings.IMG2IMG_DTYPE", "podLabels", "replicas"),
        *("topologySpread", "modelCache.storageClassName"),
    ]

    def worker(*more: str) -> Object:
        objects = render("default", *given, *more)
        return of_kind(objects, "Deployment")["demo-img2img-worker-default"]["spec"]

    before, after = worker(), worker(*(f"--set=workers.default.{each}=null" for each in none))
    names = [each["name"] for each in before["template"]["spec"]["containers"][0]["env"]]
    assert before["template"]["spec"]["nodeSelector"] == {"gpu": "l4"}
    assert before["template"]["metadata"]["labels"]["tier"] == "gpu"
    assert "IMG2IMG_DTYPE" in names
    spec = after["template"]["spec"]
    assert not {"nodeSelector", "topologySpreadConstraints"} & set(spec)
    assert "IMG2IMG_DTYPE" not in [each["name"] for each in spec["containers"][0]["env"]]
    assert "tier" not in after["template"]["metadata"]["labels"]
    assert "replicas" not in after


def test_a_later_values_file_takes_an_entry_of_an_earlier_one_out() -> None:
    both = ["--set=commonLabels.team=x,commonLabels.cost=y", "--set=env.A=b"]
    objects = render("default", *both, "--set=commonLabels.team=null,env.A=null")
    assert all("team" not in pod.labels and pod.labels["cost"] == "y" for pod in pods(objects))
    assert "A" not in of_kind(objects, "ConfigMap")["demo-img2img-settings"]["data"]
