"""The values of the examples in helm/examples fit the chart, and name the Secrets that it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.chart_render import CHART, Object, helm, pods

EXAMPLES = CHART.parent / "examples"


def documents(name: str) -> list[Object]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text(encoding="utf-8")))


def release(name: str) -> Object:
    """Returns the values of this chart in an example."""
    *_, last = documents(name)
    spec: Object = last["spec"]
    return dict(spec["values"] if "values" in spec else spec["source"]["helm"]["valuesObject"])


@pytest.mark.parametrize("name", ["argocd.yaml", "flux.yaml"])
def test_the_values_of_an_example_render_equally_every_time(name: str, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(release(name)), encoding="utf-8")
    first, second = helm("--values", str(values)), helm("--values", str(values))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    objects = [each for each in yaml.safe_load_all(first.stdout) if each]
    assert {"demo-img2img-api", "demo-img2img-worker-default"} <= {p.name for p in pods(objects)}


def test_the_bucket_of_each_store_is_that_of_the_chart() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    (minio,), (seaweedfs,) = documents("minio-values.yaml"), documents("seaweedfs-values.yaml")
    bucket = defaults["s3"]["bucket"]
    assert [each["name"] for each in minio["buckets"]] == [bucket]
    assert [each["name"] for each in seaweedfs["s3"]["createBuckets"]] == [bucket]
    (user,) = minio["users"]
    assert user["existingSecretKey"] == defaults["s3"]["secretKeyKey"]
    statements = minio["policies"][0]["statements"]
    page = (CHART.parents[1] / "docs" / "operations.md").read_text(encoding="utf-8")
    for action in (action for each in statements for action in each["actions"]):
        assert f'"{action}"' in page


def test_the_nats_servers_take_images_and_the_user_of_the_secret() -> None:
    (nats,) = documents("nats-values.yaml")
    merge = nats["config"]["merge"]
    assert merge["max_payload"] == 8 * 1024 * 1024
    (user,) = merge["authorization"]["users"]
    environment = nats["container"]["env"]
    assert {f"<< ${name} >>" for name in environment} == set(user.values())
    keys = {each["valueFrom"]["secretKeyRef"]["key"] for each in environment.values()}
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["nats"]
    assert keys == {defaults["userKey"], defaults["passwordKey"]}


def test_external_secrets_have_the_entries_that_the_chart_reads() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    made = {
        each["spec"]["target"]["name"]: {entry["secretKey"] for entry in each["spec"]["data"]}
        for each in documents("external-secrets.yaml")
    }
    assert made == {
        "img2img-s3": {defaults["s3"]["accessKeyKey"], defaults["s3"]["secretKeyKey"]},
        "img2img-api-keys": {defaults["apiKeys"]["key"]},
    }
