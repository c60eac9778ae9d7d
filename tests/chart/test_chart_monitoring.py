"""Alerts, dashboard and scalers query only metrics that the service exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
from prometheus_client import Counter, Gauge, Histogram

from img2img_server import telemetry
from img2img_server.domain.params import Lane
from img2img_server.gateway.http import middleware
from tests.chart_render import ROOT, SETS, Object, of_kind, pods, render

# Metrics of Prometheus itself, with the labels that the operator adds to targets.
TARGET_LABELS = {"namespace", "pod", "service", "img2img_pool"}
KNOWN: dict[str, set[str]] = {"up": set()}
SUFFIXES = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_sum", "_count")}
for _metric in (*vars(telemetry).values(), *vars(middleware).values()):
    if isinstance(_metric, (Counter, Gauge, Histogram)):
        for _suffix in SUFFIXES[type(_metric)]:
            KNOWN[_metric._name + _suffix] = {*_metric._labelnames, "le"}


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Returns the metrics of an expression with their label selectors. Raises an error for wrong
    syntax.
    """
    node = promql_parser.parse(expression).prettify()
    for name, labels in re.findall(r"(\w+)\{([^}]*)\}", node):
        yield name, set(re.findall(r"(\w+)(?:=~|!=|!~|=)", labels))


def alerts() -> dict[str, str]:
    (rule,) = of_kind(render("production"), "PrometheusRule").values()
    return {
        each["alert"]: each["expr"] for group in rule["spec"]["groups"] for each in group["rules"]
    }


def panels() -> dict[str, list[str]]:
    (board,) = (
        each for name, each in of_kind(render("production"), "ConfigMap").items() if "board" in name
    )
    found = json.loads(board["data"]["img2img.json"])["panels"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in found}


def queries() -> dict[str, str]:
    return {
        name: trigger["metadata"]["query"]
        for name, scaled in of_kind(render("two-pools"), "ScaledObject").items()
        for trigger in scaled["spec"]["triggers"]
        if trigger["type"] == "prometheus"
    }


def assert_exported(expression: str) -> None:
    asked = list(selectors(expression))
    assert asked
    for name, labels in asked:
        assert name in KNOWN, f"{name} is exported by no role"
        assert labels - KNOWN[name] - TARGET_LABELS == set(), name


def test_every_alert_asks_for_metrics_and_labels_that_exist() -> None:
    assert len(alerts()) == 15
    for expression in alerts().values():
        assert_exported(expression)


def test_every_panel_of_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    shown = panels()
    for expressions in shown.values():
        for expression in expressions:
            assert_exported(re.sub(r"\$\w+", "img2img", expression))
    ours = {name for name in KNOWN if name.startswith("img2img_") and not name.endswith("_sum")}
    text = json.dumps(shown)
    roots = {name.removesuffix("_bucket").removesuffix("_count") for name in ours}
    assert {root for root in roots if root not in text} == set(), "exported and never shown"


def test_the_scaler_asks_for_the_queued_device_time_of_its_pool() -> None:
    assert queries() == {
        "demo-img2img-worker-sdxl": "sum(max by (lane, state) "
        '(img2img_queued_gpu_seconds{model="sdxl-1.0",namespace="demo"}))'
    }
    for expression in queries().values():
        assert_exported(expression)


@pytest.mark.parametrize(
    ("name", "pool", "model"),
    [("two-pools", "turbo", "sd-turbo"), ("everything", "default", "private.v2")],
)
def test_the_scaler_reads_the_unfinished_jobs_of_each_lane_from_the_api(
    name: str, pool: str, model: str
) -> None:
    scaled = next(
        each for key, each in of_kind(render(name), "ScaledObject").items() if key.endswith(pool)
    )
    asked = {each["name"]: each["metadata"] for each in scaled["spec"]["triggers"]}
    assert {lane: each["valueLocation"] for lane, each in asked.items()} == {
        lane.value: f'img2img_unfinished_jobs{{lane="{lane.value}",model="{model}"}}'
        for lane in Lane
    }
    for each in asked.values():
        assert_exported(each["valueLocation"])
    (url,) = {each["url"] for each in asked.values()}
    (service,) = (
        each
        for key, each in of_kind(render(name), "Service").items()
        if key.endswith("api-headless")
    )
    (port,) = (each["port"] for each in service["spec"]["ports"] if each["name"] == "metrics")
    assert url == f"http://{service['metadata']['name']}.demo.svc:{port}/metrics"
    assert int(asked["batch"]["targetValue"]) > int(asked["realtime"]["targetValue"])


@pytest.mark.parametrize("name", SETS)
def test_every_service_monitor_finds_one_service_with_the_port(name: str) -> None:
    objects = render(name)
    for monitor in of_kind(objects, "ServiceMonitor").values():
        wanted = monitor["spec"]["selector"]["matchLabels"]
        matching = [
            service
            for service in of_kind(objects, "Service").values()
            if wanted.items() <= service["metadata"]["labels"].items()
        ]
        assert len(matching) == 1
        ports = {port["name"] for port in matching[0]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def test_metrics_of_every_role_are_read() -> None:
    objects = render("production")
    roles: set[str] = {
        each["spec"]["selector"]["matchLabels"]["app.kubernetes.io/component"]
        for each in of_kind(objects, "ServiceMonitor").values()
    }
    running: set[str] = {pod.labels["app.kubernetes.io/component"] for pod in pods(objects)}
    assert roles == running - {"test"}


def severities(rule: Object) -> set[str]:
    return {
        each["labels"]["severity"] for group in rule["spec"]["groups"] for each in group["rules"]
    }


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    (rule,) = of_kind(render("production"), "PrometheusRule").values()
    assert severities(rule) == {"critical", "warning"}
    for group in rule["spec"]["groups"]:
        for each in group["rules"]:
            assert set(each["annotations"]) == {"summary", "description"}


def test_the_page_of_alerts_explains_every_alert_with_its_severity_and_no_other() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    (rule,) = of_kind(render("production"), "PrometheusRule").values()
    levels = {
        each["alert"]: each["labels"]["severity"]
        for group in rule["spec"]["groups"]
        for each in group["rules"]
    }
    assert dict(re.findall(r"^## (Img2Img\w+)\n\nSeverity: (\w+)\.", page, re.MULTILINE)) == levels
