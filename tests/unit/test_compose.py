"""The Compose file: valid, without secrets, confined, and in agreement with settings and chart."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from img2img_server.setting_names import PREFIX
from img2img_server.settings import Settings
from tests.chart_render import CHART
from tests.compose import EXAMPLE, FILE, FOLDER, ROLES, copied, resolve, seconds, services
from tests.readme import ROOT

REQUIRED = (
    "COMPOSE_PROFILES",
    "IMG2IMG_NATS_PASSWORD",
    "IMG2IMG_S3_ACCESS_KEY",
    "IMG2IMG_S3_SECRET_KEY",
)
FILLED = dict.fromkeys(REQUIRED, "a-value") | {"COMPOSE_PROFILES": "cpu"}
WORKERS = {"cpu": "worker", "gpu": "worker-gpu"}
# Seconds after the drain, as in the chart.
AFTER_DRAIN = 20


def text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def filled(folder: Path, **changes: str) -> Path:
    """Returns a copy of the folder with a complete .env."""
    target = copied(folder / "deploy")
    lines = [f"{name}={value}\n" for name, value in {**FILLED, **changes}.items()]
    (target / ".env").write_text("".join(lines), encoding="utf-8")
    return target


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns the services of both profiles."""
    everything = filled(tmp_path_factory.mktemp("both"), COMPOSE_PROFILES="cpu,gpu")
    return services(everything)


def validated(file: Path) -> subprocess.CompletedProcess[str]:
    """Runs check-jsonschema, which contains the schema of the Compose specification."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, str(file)], capture_output=True, text=True)


def test_the_file_is_valid_by_the_schema_of_the_compose_specification(tmp_path: Path) -> None:
    done = validated(FILE)
    assert done.returncode == 0, done.stdout
    misspelt = tmp_path / "compose.yaml"
    misspelt.write_text(text("compose.yaml").replace("healthcheck:", "healtcheck:"))
    assert "healtcheck" in validated(misspelt).stdout


@pytest.mark.parametrize("name", REQUIRED)
def test_compose_refuses_to_start_without_a_secret_or_a_profile(name: str, tmp_path: Path) -> None:
    done = resolve(filled(tmp_path, **{name: ""}))
    assert done.returncode != 0
    assert f"required variable {name} is missing a value: " in done.stderr
    assert done.stderr.rstrip().endswith("in .env")


def test_the_example_names_every_variable_and_has_no_value_for_a_secret() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text("compose.yaml")))
    named = dict(re.findall(r"^#?(\w+)=(.*)$", text(EXAMPLE.name), re.MULTILINE))
    assert set(named) == used
    assert {name: named[name] for name in REQUIRED} == dict.fromkeys(REQUIRED, "")
    required = set(re.findall(r"^(\w+)=", text(EXAMPLE.name), re.MULTILINE))
    assert required == set(REQUIRED)


def test_the_example_shows_the_defaults_of_the_file() -> None:
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", text("compose.yaml")))
    shown = dict(re.findall(r"^#(\w+)=(.*)$", text(EXAMPLE.name), re.MULTILINE))
    assert {name: shown[name] for name in defaults} == defaults


def test_each_profile_has_one_kind_of_worker(tmp_path: Path) -> None:
    for profile, worker in WORKERS.items():
        names = set(services(filled(tmp_path / profile, COMPOSE_PROFILES=profile)))
        assert names == {"nats", "s3", "api", "gateway", worker}


def test_only_the_worker_for_gpus_reserves_a_gpu(found: dict[str, Any]) -> None:
    reserving = [name for name, service in found.items() if "deploy" in service]
    assert reserving == ["worker-gpu"]
    (device,) = found["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    devices = {each: found[each]["environment"]["IMG2IMG_DEVICE"] for each in WORKERS.values()}
    assert devices == {"worker": "cpu", "worker-gpu": "cuda"}


def test_every_variable_of_a_role_is_a_setting_with_a_valid_value(found: dict[str, Any]) -> None:
    for name in (*ROLES, "worker-gpu"):
        ours = {k: v for k, v in found[name]["environment"].items() if k.startswith(PREFIX)}
        values = {key.removeprefix(PREFIX).lower(): value for key, value in ours.items()}
        assert set(values) <= set(Settings.model_fields), name
        Settings(**values)


def test_a_role_has_more_time_to_stop_than_its_drain_takes(found: dict[str, Any]) -> None:
    drain = Settings.model_fields["drain_seconds"].default
    for name in (*ROLES, "worker-gpu"):
        assert seconds(found[name]["stop_grace_period"]) >= drain + AFTER_DRAIN, name


def test_only_api_and_gateway_are_published_and_only_on_loopback(found: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in found.items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:50051:50051"], "gateway": ["127.0.0.1:8080:8080"]}
    inside = {name for name, service in found.items() if service["networks"] == ["backend"]}
    assert inside == {"nats", "s3"}
    assert yaml.safe_load(text("compose.yaml"))["networks"]["backend"] == {"internal": True}


def test_every_service_is_confined_and_has_a_health_check(found: dict[str, Any]) -> None:
    for name, service in found.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["healthcheck"]["test"][0] == "CMD", name


def test_the_images_have_the_version_of_the_project(found: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    slim = f"img2img-service:{project['version']}-slim"
    images = {name: found[name]["image"] for name in (*ROLES, "worker-gpu")}
    full = f"img2img-service:{project['version']}"
    assert images == {"api": slim, "gateway": slim, "worker": full, "worker-gpu": full}
    targets = {name: found[name]["build"]["target"] for name in images}
    assert targets == {"api": "slim", "gateway": "slim", "worker": "full", "worker-gpu": "full"}


def test_nats_and_the_s3_server_are_those_of_the_charts_quickstart(found: dict[str, Any]) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["quickstart"]
    assert found["nats"]["image"] == values["nats"]["image"]
    assert found["s3"]["image"] == values["s3"]["image"]
    templates = CHART / "templates" / "quickstart"
    s3 = (templates / "s3.yaml").read_text(encoding="utf-8")
    arguments = re.findall(r"^ +- (-\S+|mini)$", s3, re.MULTILINE)
    # The user is in a Secret there, here in the environment.
    arguments.remove("-s3.config=/etc/weed/s3.json")
    assert found["s3"]["command"] == arguments
    nats = (templates / "nats.yaml").read_text(encoding="utf-8")
    limits = r"(max_payload: \w+|max_file_store: \w+|store_dir: \S+)"
    assert re.findall(limits, text("nats.conf")) == re.findall(limits, nats)
