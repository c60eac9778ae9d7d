"""Allowed connections, computed from the NetworkPolicies as Kubernetes does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart_render import SETS, Object, Pod, environment, of_kind, pods, render

ROLES = ("api", "gateway", "worker", "nats", "s3", "test")


def policies_for(objects: list[Object], pod: Pod) -> list[Object]:
    return [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy").values()
        if policy["spec"]["podSelector"]["matchLabels"].items() <= pod.labels.items()
    ]


def admits(peers: list[Object] | None, other: Pod) -> bool:
    """Returns whether the peers of a rule admit a pod of this namespace. A rule without peers
    admits all pods.
    """
    if peers is None:
        return True
    for peer in peers:
        if "ipBlock" in peer:
            continue  # Pods have addresses that are not public.
        selector = peer.get("podSelector", {}).get("matchLabels", {})
        if selector.items() <= other.labels.items():
            return True
    return False


def port_number(pod: Pod, port: Any) -> int:
    names = {
        each["name"]: each["containerPort"]
        for container in pod.spec["containers"]
        for each in container.get("ports", [])
    }
    return names.get(port, port)


def may_talk(objects: list[Object], source: Pod, target: Pod, port: int) -> bool:
    def allowed(rules: list[Object], peers: str, other: Pod) -> bool:
        return any(
            admits(rule.get(peers), other)
            and (
                "ports" not in rule
                or port in [port_number(target, p["port"]) for p in rule["ports"]]
            )
            for rule in rules
        )

    out = [rule for spec in policies_for(objects, source) for rule in spec.get("egress") or []]
    into = [rule for spec in policies_for(objects, target) for rule in spec.get("ingress") or []]
    return allowed(out, "to", target) and allowed(into, "from", source)


def test_in_a_quickstart_each_pod_reaches_its_servers_and_nothing_else() -> None:
    objects = render("quickstart")
    found = {pod.labels["app.kubernetes.io/component"]: pod for pod in pods(objects)}
    ports = {50051: "grpc", 8080: "http", 4222: "client", 8333: "s3", 9333: "master"}
    talks = {
        (source, target, ports[port])
        for source in ROLES
        for target in ROLES
        for port in ports
        if may_talk(objects, found[source], found[target], port)
    }
    assert talks == {
        ("gateway", "api", "grpc"),
        ("test", "api", "grpc"),
        ("api", "nats", "client"),
        ("worker", "nats", "client"),
        ("gateway", "s3", "s3"),
        ("worker", "s3", "s3"),
    }


@pytest.mark.parametrize("name", SETS)
def test_every_pod_is_under_the_policy_that_denies_everything(name: str) -> None:
    objects = render(name)
    for pod in pods(objects):
        denying = [
            spec
            for spec in policies_for(objects, pod)
            if "ingress" not in spec and "egress" not in spec
        ]
        assert [spec["policyTypes"] for spec in denying] == [["Ingress", "Egress"]], pod.name


def test_policies_follow_the_ports_of_the_addresses() -> None:
    def egress_ports(name: str, policy: str) -> set[int | str]:
        rules = of_kind(render(name), "NetworkPolicy")[policy]["spec"]["egress"]
        return {port["port"] for rule in rules for port in rule.get("ports", [])}

    assert egress_ports("two-pools", "demo-img2img-worker") == {53, 4222, 9000}
    assert egress_ports("production", "demo-img2img-worker") == {53, 4222, 443}
    assert egress_ports("everything", "images-gateway") == {53, 4317, "grpc", 9000}
    assert egress_ports("gateway-only", "demo-img2img-gateway") == {53, 443}


@pytest.mark.parametrize("number", ["0", "1073741824"])
def test_the_api_reaches_the_bucket_if_it_takes_uploads(number: str) -> None:
    objects = render("two-pools", "--set", f"settings.IMG2IMG_UPLOAD_BYTES={number}")
    rules = of_kind(objects, "NetworkPolicy")["demo-img2img-api"]["spec"]["egress"]
    ports = {port["port"] for rule in rules for port in rule.get("ports", [])}
    [api] = [pod for pod in pods(objects) if pod.labels["app.kubernetes.io/component"] == "api"]
    names = set(environment(objects, api.spec["containers"][0]))
    takes_uploads = number != "0"
    assert (9000 in ports) is takes_uploads
    assert ("IMG2IMG_S3_ACCESS_KEY" in names) is takes_uploads


def test_no_rule_lets_the_public_rule_reach_addresses_that_are_not_public() -> None:
    rules = of_kind(render("default"), "NetworkPolicy")["demo-img2img-api"]["spec"]["egress"]
    blocks = [peer["ipBlock"] for rule in rules for peer in rule.get("to", []) if "ipBlock" in peer]
    closed = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"]
    assert blocks == [{"cidr": "0.0.0.0/0", "except": closed}, {"cidr": "2000::/3"}]
