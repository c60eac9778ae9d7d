"""Wrong values are rejected, with a message that names the value and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from img2img_server.api.keys import KeyRing
from img2img_server.domain.tenants import TENANT_PATTERN
from tests.chart_render import CHART, environment, helm, of_kind, pods, refusal, render


def test_the_chart_takes_the_names_of_tenants_that_the_service_takes() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    tenants = schema["properties"]["apiKeys"]["properties"]["tenants"]
    assert tenants["propertyNames"] == {"pattern": f"^{TENANT_PATTERN}$"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("api.replica=3", "at '/api': additional properties 'replica' not allowed"),
        ("worker.default=1", "additional properties 'worker' not allowed"),
        ("workers.default.gpus.count=1", "additional properties 'gpus' not allowed"),
        ("workers.Big.replicas=1", "'Big' does not match pattern"),
        (
            "settings.IMG2IMG_QUEUE_LIMT=3",
            "additional properties 'IMG2IMG_QUEUE_LIMT' not allowed",
        ),
        ("settings.IMG2IMG_QUEUE_LIMIT=0", "/settings/IMG2IMG_QUEUE_LIMIT': minimum"),
        ("settings.IMG2IMG_NATS_URL=x", "additional properties 'IMG2IMG_NATS_URL' not allowed"),
        ("settings.IMG2IMG_DEV_KEY=true", "additional properties 'IMG2IMG_DEV_KEY' not allowed"),
        ("env.IMG2IMG_DEVICE=cpu", "invalid propertyName 'IMG2IMG_DEVICE'"),
        ("nats.replicas=2", "at '/nats/replicas': value must be one of 1, 3, 5"),
        ("nats.url=nats://me:secret@nats:4222", "at '/nats/url'"),
        ("api.service.type=Loadbalancer", "'ClusterIP', 'NodePort', 'LoadBalancer'"),
        ("api.drainSeconds=-1", "at '/api/drainSeconds': minimum"),
        ("api.drainSeconds=soon", "at '/api/drainSeconds': got string, want number"),
        ("image.digest=sha256:abc", "at '/image/digest'"),
        ("workers.default.model.source=sd turbo", "/workers/default/model/source'"),
        ("workers.default.resources.limit.cpu=1", "additional properties 'limit' not allowed"),
    ],
)
def test_a_wrong_value_is_refused_by_the_schema_with_its_place(given: str, said: str) -> None:
    assert said in refusal("--set", given)


def test_everything_that_is_missing_is_said_at_once() -> None:
    said = helm().stderr
    missing = ["nats.url", "s3.endpointUrl", "s3.existingSecret", "apiKeys.existingSecret"]
    assert [each for each in missing if f"  - {each}" not in said] == []


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("default", "nats.existingSecret=x", "nats.url and nats.existingSecret exclude each other"),
        ("default", "s3.accessKey=x", "s3.existingSecret and s3.accessKey exclude each other"),
        ("default", "s3.identity=true", "s3.identity excludes s3.existingSecret"),
        ("quickstart", "s3.sessionTokenKey=x", "an entry of s3.existingSecret, which is missing"),
        ("everything", "nats.authSecret=x", "nats.authSecret belongs to nats.url"),
        ("default", "api.enabled=false", "gateway.apiAddress is missing"),
        (
            "default",
            "api.tls.clientCaSecret=ca",
            "api.tls.clientCaSecret needs api.tls.existingSecret",
        ),
        ("everything", "gateway.apiCertSecret=", "gateway.apiCertSecret is missing"),
        ("default", "gateway.ingress.enabled=true", "gateway.ingress.host is missing"),
        (
            "default",
            "api.autoscaling.maxReplicas=1",
            "api.autoscaling.maxReplicas is below minReplicas",
        ),
        ("quickstart", "nats.replicas=3", "nats.replicas must be 1"),
        ("quickstart", "s3.existingSecret=x", "leave those in s3 empty"),
        (
            "default",
            "workers.default.model.source=stabilityai/sd-turbo",
            "workers.default: stabilityai/sd-turbo must be fetched",
        ),
        ("default", "workers.default.model.source=/models/x", "/models/x needs a modelCache"),
        ("default", "workers.default.modelCache.type=image", "modelCache.image is missing"),
        (
            "two-pools",
            "api.enabled=false",
            "workers.turbo: without an api in this release, the trigger jobs needs",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_the_way_out(
    name: str, given: str, said: str
) -> None:
    assert said in refusal("--set", given, name=name)


def limits(*given: str) -> dict[str, Any]:
    """Returns the resources of a worker in the pool `default`."""
    pod = next(
        pod
        for pod in pods(render("default", *(f"--set={each}" for each in given)))
        if pod.name == "demo-img2img-worker-default"
    )
    return dict(pod.containers()[-1].get("resources", {}))


REQUESTS = {"cpu": "1", "memory": "2Gi"}
GPU = {"nvidia.com/gpu": 1}


@pytest.mark.parametrize("values", ["workers.default", "workerDefaults"])
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("resources.limits.cpu=null", {"requests": REQUESTS, "limits": {"memory": "4Gi"}}),
        ("resources.limits=null", {"requests": REQUESTS}),
        ("resources.requests=null", {"limits": {"cpu": "4", "memory": "4Gi"}}),
        ("resources=null", {}),
    ],
)
def test_a_null_takes_a_default_of_the_resources_out(
    values: str, given: str, wanted: dict[str, Any]
) -> None:
    assert limits(f"{values}.{given}") == wanted
    with_gpu = limits(f"{values}.{given}", "workers.default.gpu.count=1")
    assert with_gpu == wanted | {"limits": GPU | wanted.get("limits", {})}


@pytest.mark.parametrize("role", ["api", "gateway"])
@pytest.mark.parametrize("part", ["limits.cpu", "limits", "requests", "requests,limits"])
def test_a_null_takes_resources_out_of_every_role(role: str, part: str) -> None:
    given = [f"--set={role}.resources.{each}=null" for each in part.split(",")]
    pod = next(pod for pod in pods(render("default", *given)) if pod.name == f"demo-img2img-{role}")
    resources = pod.containers()[0].get("resources", {})
    for each in part.split(","):
        first, _, second = each.partition(".")
        assert not resources.get(first, {}).get(second) if second else first not in resources
    objects = render("default", f"--set={role}.resources=null")
    pod = next(pod for pod in pods(objects) if pod.name == f"demo-img2img-{role}")
    assert "resources" not in pod.containers()[0]


def test_without_keys_pods_have_the_roles_of_their_service_accounts() -> None:
    objects = render("identity")
    accounts = of_kind(objects, "ServiceAccount")
    role = {"eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/img2img-write"}
    assert accounts["demo-img2img-worker"]["metadata"]["annotations"] == role
    assert "annotations" not in accounts["demo-img2img-api"]["metadata"]
    for pod in pods(objects):
        for container in pod.containers():
            found = environment(objects, container)
            assert not {"IMG2IMG_S3_ACCESS_KEY", "IMG2IMG_S3_SECRET_KEY"} & set(found)
    assert "Secret" not in {each["kind"] for each in objects}
    egress = of_kind(objects, "NetworkPolicy")["demo-img2img-gateway"]["spec"]["egress"]
    assert {"ports": [{"port": 443, "protocol": "TCP"}]} in egress


def test_large_numbers_reach_the_environment_as_digits() -> None:
    objects = render("everything")
    container = next(pod for pod in pods(objects) if pod.name == "images-api").containers()[0]
    assert environment(objects, container)["IMG2IMG_MAX_IMAGE_PIXELS"] == "100000000"


def test_the_quickstart_draws_keys_of_its_own_when_none_are_given() -> None:
    names = ("apiKey.value", "nats.password", "s3.accessKey", "s3.secretKey")
    none = [f"quickstart.{name}=" for name in names]
    secrets = of_kind(render("quickstart", *(f"--set={each}" for each in none)), "Secret")
    key = secrets["demo-img2img-quickstart"]["stringData"]["api-key"]
    pair = secrets["demo-img2img-s3"]["stringData"]
    nats = secrets["demo-img2img-nats"]["stringData"]
    drawn = [key, pair["access-key"], pair["secret-key"], nats["password"]]
    assert [len(each) for each in drawn] == [40] * 4
    assert len(set(drawn)) == 4
    assert pair["access-key"] in pair["s3.json"]
    assert f'password: "{nats["password"]}"' in nats["nats.conf"]


def test_only_the_roles_of_a_quickstart_can_use_its_nats_server() -> None:
    objects = render("quickstart")
    roles = [pod for pod in pods(objects) if pod.name.endswith(("-api", "-worker-default"))]
    assert len(roles) == 2
    for pod in roles:
        for container in pod.containers():
            variables = environment(objects, container)
            for entry in ("user", "password"):
                source = {"secretKeyRef": {"name": "demo-img2img-nats", "key": entry}}
                assert variables[f"IMG2IMG_NATS_{entry.upper()}"] == source


def test_a_platform_that_assigns_users_is_not_reported_one() -> None:
    for pod in pods(render("default", "--set=user=null")):
        assert set(pod.spec["securityContext"]) == {"runAsNonRoot", "seccompProfile"}


def test_the_keys_file_that_the_chart_writes_is_one_that_the_api_reads(tmp_path: Path) -> None:
    secret = of_kind(render("two-pools"), "Secret")["demo-img2img-api-keys"]
    file = tmp_path / "keys.toml"
    file.write_text(secret["stringData"]["keys.toml"], encoding="utf-8")
    holder = KeyRing(file, dev_key=False).authenticate("test")
    assert holder is not None
    assert (holder.tenant, holder.permissions) == ("shop", frozenset())


@pytest.mark.parametrize("group", ["image", "nats", "api.service", "workerDefaults.modelCache"])
def test_a_null_for_a_group_of_values_is_refused_by_its_name(group: str) -> None:
    assert f"missing property '{group.rpartition('.')[2]}'" in refusal(f"--set={group}=null")


@pytest.mark.parametrize(
    "value", ["commonLabels", "api.topologySpread", "api.enabled", "quickstart.nats.enabled"]
)
def test_a_null_for_a_map_or_a_switch_takes_it_out(value: str) -> None:
    given = ["--set=gateway.apiAddress=api:50051"] if value == "api.enabled" else []
    assert render("production", f"--set={value}=null", *given)
