"""The chart and `Settings` agree: every variable exists, all required ones are set, and the
settings load.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from helm.generate import LOCAL, OWNED
from img2img_server.setting_names import PREFIX
from img2img_server.settings import Settings, is_loopback
from tests.chart_render import CHART, SETS, Object, environment, pods, render

# For each role, the settings whose defaults are wrong on a cluster.
MUST = {
    "api": {"grpc_host", "metrics_host", "nats_url", "api_keys_file", "drain_seconds"},
    "gateway": {
        *("http_host", "metrics_host", "api_address", "drain_seconds"),
        *("s3_endpoint_url", "s3_bucket"),
    },
    "worker": {
        *("metrics_host", "nats_url", "device", "worker_name", "drain_seconds"),
        *("s3_endpoint_url", "s3_bucket"),
    },
}
NAMES = {PREFIX + name.upper(): name for name in Settings.model_fields}


def containers(name: str) -> list[tuple[list[Object], str, Object]]:
    """Yields every container that runs our command, with its object and its role."""
    objects = render(name)
    return [
        (objects, container["args"][0], container)
        for pod in pods(objects)
        for container in pod.containers()
        if container["command"] == ["img2img-server"]
    ]


def ours(objects: list[Object], container: Object) -> dict[str, Any]:
    """Returns the IMG2IMG_ variables of a container."""
    found = environment(objects, container)
    return {key: value for key, value in found.items() if key.startswith(PREFIX)}


@pytest.mark.parametrize("name", SETS)
def test_every_variable_that_the_chart_sets_is_a_setting(name: str) -> None:
    for objects, _, container in containers(name):
        assert set(ours(objects, container)) - set(NAMES) == set()


@pytest.mark.parametrize("name", SETS)
def test_every_setting_that_a_role_must_be_given_is_given(name: str) -> None:
    for objects, role, container in containers(name):
        given = {NAMES[key] for key in ours(objects, container)}
        assert MUST.get(role, set()) - given == set(), role


def test_every_setting_that_points_at_this_machine_is_given_on_a_cluster() -> None:
    local = {
        name
        for name, field in Settings.model_fields.items()
        if any(f in str(field.get_default()) for f in ("127.0.0.1", "localhost"))
        or (isinstance(field.default, str) and is_loopback(field.default))
    }
    secret = {"nats_url"}  # SecretStr hides its default, which is on loopback.
    assert (local | secret) - set().union(*MUST.values()) == set()


def test_every_setting_is_made_by_the_chart_or_free_or_of_local_alone() -> None:
    made = {
        NAMES[key]
        for name in SETS
        for objects, _, container in containers(name)
        for key in ours(objects, container)
    }
    schema = yaml.safe_load((CHART / "values.schema.json").read_text(encoding="utf-8"))
    free = {NAMES[key] for key in schema["definitions"]["settings"]["properties"]}
    assert made - free == OWNED
    assert free | OWNED | LOCAL == set(Settings.model_fields)
    assert free & (OWNED | LOCAL) == set()


def test_no_secret_setting_may_lie_in_a_config_map() -> None:
    secret = {
        name for name, field in Settings.model_fields.items() if "Secret" in str(field.annotation)
    }
    assert secret - OWNED == set()


@pytest.mark.parametrize("name", SETS)
def test_the_roles_take_what_they_are_given(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for objects, role, container in containers(name):
        with monkeypatch.context() as patch:
            for key, value in ours(objects, container).items():
                patch.setenv(key, value if isinstance(value, str) else stand_in(value))
            settings = Settings.load()
        assert settings.metrics_port == 9090, role


def test_addresses_of_ipv6_have_the_form_that_each_server_takes() -> None:
    found = {role: ours(objects, each) for objects, role, each in containers("everything")}
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 on this machine: {error.strerror}")
    with socket.create_server((found["gateway"]["IMG2IMG_HTTP_HOST"], 0), family=socket.AF_INET6):
        pass
    server = grpc.server(ThreadPoolExecutor())
    assert server.add_insecure_port(f"{found['api']['IMG2IMG_GRPC_HOST']}:0")
    assert {each["IMG2IMG_METRICS_HOST"] for each in found.values()} == {"::"}


def stand_in(source: Object) -> str:
    """Returns a value of the kind that the cluster would insert."""
    return "2" if "resourceFieldRef" in source else "nats://somewhere:4222"


@pytest.mark.parametrize("name", SETS)
def test_a_role_that_reads_the_bus_or_the_bucket_is_reported_one_address_of_it(name: str) -> None:
    for objects, role, container in containers(name):
        found = ours(objects, container)
        if role in ("api", "worker"):
            assert found["IMG2IMG_NATS_URL"]
        assert found["IMG2IMG_S3_ENDPOINT_URL"].startswith("http")
