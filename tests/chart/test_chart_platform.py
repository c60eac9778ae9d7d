"""A platform adds its own accounts, variables, volumes, containers, labels and triggers."""

from __future__ import annotations

import pytest

from tests.chart_render import Object, Pod, environment, of_kind, pods, refusal, render

ROLES = {
    "api": "demo-img2img-api",
    "gateway": "demo-img2img-gateway",
    "worker": "demo-img2img-worker-default",
}


def objects() -> list[Object]:
    return render("platform")


def pod(role: str) -> Pod:
    return next(each for each in pods(objects()) if each.name == ROLES[role])


def service_container(role: str) -> Object:
    return next(each for each in pod(role).spec["containers"] if each["name"] == role)


def test_service_accounts_have_the_names_labels_and_annotations_of_the_platform() -> None:
    accounts = of_kind(objects(), "ServiceAccount")
    assert set(accounts) == {"img2img-serving", "demo-img2img-worker"}
    serving = accounts["img2img-serving"]["metadata"]
    assert serving["labels"]["team"] == "imaging"
    assert serving["labels"]["app.kubernetes.io/component"] == "api"
    worker = accounts["demo-img2img-worker"]
    assert worker["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": "arn:aws:iam::111122223333:role/img2img-write",
        "example.com/owner": "imaging",
    }
    assert worker["automountServiceAccountToken"] is True
    used = {role: pod(role).spec["serviceAccountName"] for role in ROLES}
    assert used == {
        "api": "img2img-serving",
        "gateway": "img2img-serving",
        "worker": "demo-img2img-worker",
    }
    without = render("platform", "--set=serviceAccounts.gateway.name=")
    gateway = next(each for each in pods(without) if each.name == ROLES["gateway"])
    assert gateway.spec["serviceAccountName"] == "default"


@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_the_variables_and_volumes_of_the_platform(role: str) -> None:
    container = service_container(role)
    names = [each["name"] for each in container["env"]]
    assert len(names) == len(set(names)), "Kubernetes refuses a second variable with one name"
    found = environment(objects(), container)
    assert found["SSL_CERT_FILE"] == "/etc/corp/ca.pem"
    assert found["NODE_NAME"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    assert container["envFrom"] == [
        {"configMapRef": {"name": "demo-img2img-settings"}},
        {"secretRef": {"name": "img2img-proxy"}},
    ]
    assert {"name": "corp-ca", "mountPath": "/etc/corp", "readOnly": True} in container[
        "volumeMounts"
    ]
    volumes = [each["name"] for each in pod(role).spec["volumes"]]
    assert volumes.count("corp-ca") == 1
    assert len(volumes) == len(set(volumes))
    assert pod(role).spec["schedulerName"] == "fair-scheduler"
    assert pod(role).spec["dnsConfig"] == {"options": [{"name": "ndots", "value": "2"}]}


def test_init_containers_of_the_platform_run_before_the_download_of_the_model() -> None:
    before = {
        role: [each["name"] for each in pod(role).spec.get("initContainers", [])] for role in ROLES
    }
    assert before == {
        "api": ["corp-ca", "proxy"],
        "gateway": ["corp-ca", "proxy"],
        "worker": ["corp-ca", "proxy", "fetch-model"],
    }
    fetch = pod("worker").spec["initContainers"][-1]
    found = environment(objects(), fetch)
    assert found["HF_ENDPOINT"] == "https://hub.corp.example.com"
    assert found["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert {each["name"] for each in fetch["volumeMounts"]} == {"models", "tmp", "corp-ca"}
    containers = {role: [each["name"] for each in pod(role).spec["containers"]] for role in ROLES}
    assert containers == {
        "api": ["api"],
        "gateway": ["gateway", "access-log"],
        "worker": ["worker"],
    }


def test_labels_and_annotations_reach_pods_deployments_and_every_object() -> None:
    for each in objects():
        assert each["metadata"]["labels"]["cost-center"] == "4711"
        assert each["metadata"]["annotations"]["example.com/owner"] == "imaging", each["kind"]
    deployments = of_kind(objects(), "Deployment")
    for name, each in deployments.items():
        metadata = each["spec"]["template"]["metadata"]
        assert metadata["labels"]["azure.workload.identity/use"] == "true"
        assert metadata["annotations"]["example.com/mesh"] == "managed"
        annotations = each["metadata"]["annotations"]
        assert annotations["reloader.stakater.com/auto"] == "true"
        assert annotations.get("example.com/rollout") == (
            "canary" if name == ROLES["gateway"] else None
        )
    test = of_kind(objects(), "Pod")["demo-img2img-test-job"]["metadata"]
    assert test["annotations"]["example.com/mesh"] == "none"
    assert test["annotations"]["helm.sh/hook"] == "test"


def test_labels_of_the_platform_do_not_replace_those_that_select_the_pods() -> None:
    given = "--set=podLabels.app\\.kubernetes\\.io/component=x"
    rendered = render("platform", given)
    for each in of_kind(rendered, "Deployment").values():
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert each["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_a_new_version_of_the_chart_alone_restarts_no_pod() -> None:
    for each in of_kind(objects(), "Deployment").values():
        metadata = each["spec"]["template"]["metadata"]
        assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(metadata["labels"])
        assert {"helm.sh/chart", "app.kubernetes.io/version"} <= set(each["metadata"]["labels"])


def test_the_checksum_of_pods_depends_on_settings_and_not_on_values_that_pods_do_not_read() -> None:
    def checksums(*given: str) -> set[str]:
        deployments = of_kind(render("default", *given), "Deployment").values()
        return {
            each["spec"]["template"]["metadata"]["annotations"]["checksum/settings"]
            for each in deployments
        }

    (before,) = checksums()
    assert checksums("--set=nats.port=4223", "--set=s3.sessionTokenKey=x") == {before}
    assert checksums("--set=settings.IMG2IMG_QUEUE_LIMIT=3") != {before}
    keys = ("--set=s3.existingSecret=", "--set=s3.accessKey=a")
    assert checksums(*keys, "--set=s3.secretKey=b") != checksums(*keys, "--set=s3.secretKey=c")


def test_limits_are_taken_out_and_the_gpu_stays() -> None:
    assert service_container("worker")["resources"] == {
        "requests": {"cpu": "1", "memory": "2Gi"},
        "limits": {"nvidia.com/gpu": 1},
    }
    assert service_container("api")["resources"]["limits"] == {"memory": "1536Mi"}
    assert "replicas" not in of_kind(objects(), "Deployment")[ROLES["gateway"]]["spec"]


def test_the_scaler_authenticates_at_prometheus_and_has_the_triggers_of_the_platform() -> None:
    (scaled,) = of_kind(objects(), "ScaledObject").values()
    prometheus, cron = scaled["spec"]["triggers"]
    assert prometheus["authenticationRef"] == {
        "name": "thanos",
        "kind": "ClusterTriggerAuthentication",
    }
    assert prometheus["metadata"]["authModes"] == "bearer"
    assert cron["type"] == "cron"
    behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behavior == {
        "scaleUp": {"policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}]}
    }
    alone = render("platform", "--set=workers.default.autoscaling.trigger=none",
                   "--set=workers.default.autoscaling.authenticationRef=null")  # fmt: skip
    (scaled,) = of_kind(alone, "ScaledObject").values()
    assert [each["type"] for each in scaled["spec"]["triggers"]] == ["cron"]


def test_the_autoscaler_of_the_api_has_other_metrics_and_another_behaviour() -> None:
    (scaler,) = of_kind(objects(), "HorizontalPodAutoscaler").values()
    assert [each["type"] for each in scaler["spec"]["metrics"]] == ["Pods"]
    assert scaler["spec"]["behavior"] == {
        "scaleUp": {"stabilizationWindowSeconds": 30},
        "scaleDown": {"stabilizationWindowSeconds": 300},
    }


def test_the_load_balancer_has_its_class_its_networks_and_its_port_on_the_nodes() -> None:
    spec = of_kind(objects(), "Service")["demo-img2img-api"]["spec"]
    assert spec["loadBalancerClass"] == "service.k8s.aws/nlb"
    assert spec["loadBalancerSourceRanges"] == ["10.0.0.0/8"]
    assert spec["externalTrafficPolicy"] == "Local"
    assert spec["ports"][0]["nodePort"] == 30051


def test_an_uninstalled_release_keeps_the_claim_of_its_models() -> None:
    (claim,) = of_kind(objects(), "PersistentVolumeClaim").values()
    assert claim["metadata"]["annotations"] == {
        "helm.sh/resource-policy": "keep",
        "example.com/backup": "false",
        "example.com/owner": "imaging",
    }


def test_service_monitors_of_another_namespace_find_the_services_of_the_release() -> None:
    for monitor in of_kind(objects(), "ServiceMonitor").values():
        assert monitor["metadata"]["namespace"] == "monitoring"
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["demo"]}
        (endpoint,) = monitor["spec"]["endpoints"]
        assert (endpoint["interval"], endpoint["scrapeTimeout"]) == ("30s", "10s")
        assert endpoint["relabelings"] == [{"targetLabel": "cluster", "replacement": "eu-1"}]
        assert endpoint["metricRelabelings"][0]["action"] == "drop"


def test_single_alerts_are_turned_off_and_changed_and_all_have_a_runbook() -> None:
    def alerts(name: str) -> dict[str, Object]:
        (rule,) = of_kind(render(name), "PrometheusRule").values()
        return {each["alert"]: each for group in rule["spec"]["groups"] for each in group["rules"]}

    all_alerts, ours = alerts("production"), alerts("platform")
    assert set(all_alerts) - set(ours) == {"Img2ImgWebhooksFailing"}
    assert ours["Img2ImgQueueSlow"]["for"] == "20m"
    assert ours["Img2ImgQueueSlow"]["labels"] == {"severity": "critical", "team": "imaging"}
    for name, each in ours.items():
        page = f"https://runbooks.corp.example.com/img2img/alerts#{name.lower()}"
        assert each["annotations"]["runbook_url"] == page
        assert each["labels"]["team"] == "imaging"
        if name != "Img2ImgQueueSlow":
            assert each.get("for") == all_alerts[name].get("for")
            assert each["labels"]["severity"] == all_alerts[name]["labels"]["severity"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("extraEnv[0].name=IMG2IMG_NATS_USER", "the chart sets IMG2IMG_NATS_USER"),
        ("extraEnv[0].name=IMG2IMG_QUEUE_LIMT", "value must be one of"),
        ("extraEnv[0].secret=x", "additional properties 'secret' not allowed"),
        ("monitoring.prometheusRule.alerts.Img2ImgSlow.enabled=false", "'Img2ImgSlow' not allowed"),
        ("api.autoscaling.metrics=null", "api.autoscaling has no metric"),
        ("gateway.service.nodePort=30080", "gateway.service: nodePort and externalTrafficPolicy"),
        ("gateway.service.loadBalancerClass=x", "gateway.service: loadBalancerClass"),
        (
            "workers.default.autoscaling.trigger=jobs",
            "workers.default: autoscaling.authenticationRef belongs to the trigger prometheus",
        ),
        ("quickstart.seed=short", "at '/quickstart/seed'"),
    ],
)
def test_additions_that_do_not_fit_are_refused_with_their_place(given: str, said: str) -> None:
    assert said in refusal("--set", given, name="platform")


def test_a_seed_gives_the_quickstart_equal_secrets_at_every_render() -> None:
    names = ("apiKey.value", "nats.password", "s3.accessKey", "s3.secretKey")
    none = [f"--set=quickstart.{name}=" for name in names]

    def drawn(seed: str) -> list[str]:
        given = [*none, f"--set=quickstart.seed={seed}", "--set=test.timeoutSeconds=301"]
        render.cache_clear()
        secrets = of_kind(render("quickstart", *given), "Secret")
        pair = secrets["demo-img2img-s3"]["stringData"]
        return [
            secrets["demo-img2img-quickstart"]["stringData"]["api-key"],
            secrets["demo-img2img-nats"]["stringData"]["password"],
            pair["access-key"],
            pair["secret-key"],
        ]

    first = drawn("0123456789abcdef")
    assert drawn("0123456789abcdef") == first
    assert len({*first, *drawn("fedcba9876543210")}) == 8
    assert {len(each) for each in first} == {40}
