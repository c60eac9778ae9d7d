"""A pool whose workers serve several models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from img2img_server.engine.catalogue import read_catalogue
from img2img_server.settings import Settings
from tests.chart_render import helm, value_set

CATALOGUE: list[dict[str, Any]] = [
    {"name": "photo", "source": "/models/photo.safetensors", "defaults": {"strength": 0.5}},
    {"source": "acme/fast@v2", "max_batch_size": 4},
    {"source": "s3://models/team/slow"},
    {},
]
NAMES = ["photo", "acme/fast", "slow", "atelier"]


def pool(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"catalogue": CATALOGUE},
        "modelCache": {"type": "persistentVolumeClaim"},
        **changes,
    }


def rendered(folder: Path, pool: dict[str, Any]) -> tuple[str, list[Any]]:
    """Returns the errors of helm and the objects of a release with this pool."""
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump({"workers": {"default": pool}}))
    done = helm("--values", value_set("default"), "--values", str(file))
    return done.stderr, [each for each in yaml.safe_load_all(done.stdout) if each]


def named(objects: list[Any], kind: str, end: str) -> Any:
    (found,) = [
        each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(end)
    ]
    return found


def test_the_worker_reads_the_catalogue_with_the_fetched_models(tmp_path: Path) -> None:
    errors, objects = rendered(tmp_path, pool())
    assert not errors
    content = named(objects, "ConfigMap", "-catalogue")["data"]["models.json"]
    spec = named(objects, "Deployment", "-worker-default")["spec"]["template"]["spec"]
    fetched = {each["args"][1]: each["args"][2] for each in spec["initContainers"]}
    assert list(fetched) == ["acme/fast@v2", "s3://models/team/slow"]
    models = json.loads(content)["models"]
    assert [each["source"] for each in models[:3]] == [
        "/models/photo.safetensors",
        *fetched.values(),
    ]
    (container,) = spec["containers"]
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert "IMG2IMG_MODEL" not in environment
    path = Path(environment["IMG2IMG_MODELS_FILE"])
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in spec["volumes"]}
    mounted = volumes[mounts[str(path.parent)]]["configMap"]["name"]
    assert mounted == named(objects, "ConfigMap", "-catalogue")["metadata"]["name"]
    # The worker accepts the file.
    (tmp_path / path.name).write_text(content)
    found = read_catalogue(Settings(models_file=tmp_path / path.name))
    assert [each.name for each in found] == NAMES
    assert found[0].settings.default_strength == 0.5


def test_loras_of_a_prefix_have_a_writable_folder_for_each_prefix(tmp_path: Path) -> None:
    entries = [
        {"name": "a", "lora_s3_prefix": "loras/a/"},
        {"name": "b", "lora_s3_prefix": "loras/b", "lora_dir": "/data/b"},
        {"name": "c"},
    ]
    errors, objects = rendered(tmp_path, pool(model={"catalogue": entries}))
    assert not errors
    content = named(objects, "ConfigMap", "-catalogue")["data"]["models.json"]
    spec = named(objects, "Deployment", "-worker-default")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    volumes = {each["name"]: each for each in spec["volumes"]}
    # No limit: /tmp is too small for many LoRAs.
    assert volumes[mounts["/loras"]["name"]]["emptyDir"] == {}
    assert not mounts["/loras"].get("readOnly")
    (tmp_path / "models.json").write_text(content)
    found = read_catalogue(Settings(models_file=tmp_path / "models.json"))
    assert [(each.settings.lora_dir, each.settings.lora_s3_prefix) for each in found] == [
        (Path("/loras/loras/a"), "loras/a/"),
        (Path("/data/b"), "loras/b"),
        (None, ""),
    ]


def test_a_change_of_the_catalogue_restarts_the_workers(tmp_path: Path) -> None:
    checksums = set()
    for models in (CATALOGUE, CATALOGUE[:1]):
        _, objects = rendered(tmp_path, pool(model={"catalogue": models}))
        worker = named(objects, "Deployment", "-worker-default")
        annotations = worker["spec"]["template"]["metadata"]["annotations"]
        checksums.add(annotations["checksum/catalogue"])
    assert len(checksums) == 2


def test_keda_counts_the_jobs_of_every_model(tmp_path: Path) -> None:
    _, objects = rendered(tmp_path, pool(autoscaling={"enabled": True, "trigger": "jobs"}))
    triggers = named(objects, "ScaledObject", "")["spec"]["triggers"]
    assert len({each["name"] for each in triggers}) == 2 * len(NAMES)
    places = [each["metadata"]["valueLocation"] for each in triggers]
    for name in NAMES:
        assert sum(f'model="{name}"' in place for place in places) == 2
    scaling = {"enabled": True, "trigger": "prometheus", "prometheusAddress": "http://p:9090"}
    _, objects = rendered(tmp_path, pool(autoscaling=scaling))
    (trigger,) = named(objects, "ScaledObject", "")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    assert 'max by (model, lane, state) (img2img_queued_gpu_seconds{model=~"photo|' in query


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model": {"source": "a/b", "catalogue": CATALOGUE}},
            "model.source and model.catalogue cannot be used together",
        ),
        (
            {"model": {"catalogue": [{"name": "a"}, {"name": "a"}]}},
            "two models of model.catalogue have the same name",
        ),
        ({"modelCache": {"type": "none"}}, "acme/fast@v2 must be fetched"),
        (
            {
                "model": {"catalogue": [{"source": "/models/a"}]},
                "modelCache": {"type": "none"},
            },
            "/models/a needs a modelCache",
        ),
    ],
    ids=["both", "names", "fetch", "folder"],
)
def test_a_catalogue_that_cannot_be_served_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    errors, _ = rendered(tmp_path, pool(**changes))
    assert sentence in errors
