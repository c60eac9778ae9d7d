"""Reads deploy/compose.yaml as Compose does, and describes its services as pods for kubelet.py.

podman-compose replaces the variables and fills in the defaults. As pods the services keep their
command, environment, mounts, read-only root, health check and time to stop; all of them run as the
user of pods.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values

from tests.chart_render import ROOT, Object

FOLDER = ROOT / "deploy"
FILE = FOLDER / "compose.yaml"
EXAMPLE = FOLDER / ".env.example"
ROLES = ("api", "gateway", "worker")
# The image has this variable, which it needs because users have no home.
IMAGE_ENVIRONMENT = {"HOME": "/tmp"}
_DURATION = re.compile(r"(\d+)(h|m|s)")
_UNITS = {"h": 3600, "m": 60, "s": 1}
_URL = re.compile(r"http://127\.0\.0\.1:(\d+)(/\S*)")

Service = dict[str, Any]


def copied(target: Path) -> Path:
    """Returns a copy of the folder with the files that a clone has."""
    ignored = shutil.ignore_patterns(".env", "keys", "settings.env")
    return Path(shutil.copytree(FOLDER, target, ignore=ignored))


def resolve(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs podman-compose, which prints the file with replaced variables. It needs no podman."""
    command = [sys.executable, "-m", "podman_compose", "--dry-run", "config"]
    return subprocess.run(command, cwd=folder, env={"PATH": ""}, capture_output=True, text=True)


def services(folder: Path) -> dict[str, Service]:
    """Returns the services of the chosen profiles, with variables replaced."""
    done = resolve(folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Service] = yaml.safe_load(done.stdout)["services"]
    return found


def seconds(duration: str) -> int:
    """Returns the length of a duration, for example 1m30s."""
    return sum(int(number) * _UNITS[unit] for number, unit in _DURATION.findall(duration))


def starting_order(found: dict[str, Service]) -> list[list[str]]:
    """Returns groups of services; each one needs services of earlier groups only."""
    groups: list[list[str]] = []
    started: set[str] = set()
    while len(started) < len(found):
        ready = [
            name
            for name, service in found.items()
            if name not in started and set(service.get("depends_on", {})) <= started
        ]
        assert ready, "services wait for each other"
        groups.append(ready)
        started |= set(ready)
    return groups


def pods(folder: Path) -> list[Object]:
    """Returns a pod and a Service for each service of the file."""
    objects: list[Object] = []
    for name, service in services(folder).items():
        labels = {"service": name}
        files, volumes, mounts = _volumes(folder, name, service)
        environment = IMAGE_ENVIRONMENT | _environment(folder, service)
        container = {
            "name": name,
            "command": service.get("entrypoint", ["img2img-server"]),
            "args": service["command"],
            "env": [{"name": key, "value": value} for key, value in environment.items()],
            "volumeMounts": mounts,
            "ports": [],
            "readinessProbe": _probe(service["healthcheck"]),
        }
        spec = {
            "containers": [container],
            "volumes": volumes,
            "terminationGracePeriodSeconds": seconds(service["stop_grace_period"]),
        }
        metadata = {"name": name, "labels": labels}
        objects += files
        objects += [{"kind": "Pod", "metadata": metadata, "spec": spec}]
        objects += [{"kind": "Service", "metadata": metadata, "spec": {"selector": labels}}]
    return objects


def _environment(folder: Path, service: Service) -> dict[str, str]:
    """Returns the variables of env_file, then those of the file, which take precedence."""
    found: dict[str, str] = {}
    for each in service.get("env_file", []):
        path = folder / each["path"]
        assert path.exists() or not each["required"], path
        found |= {key: value or "" for key, value in dotenv_values(path).items()}
    return found | service["environment"]


def _volumes(
    folder: Path, name: str, service: Service
) -> tuple[list[Object], list[Object], list[Object]]:
    """Returns ConfigMaps of the mounted files, the volumes and the mounts."""
    files, volumes, mounts = [], [], []
    for each in service.get("volumes", []):
        if isinstance(each, str):
            source, target = each.split(":")
            volumes.append({"name": source, "emptyDir": {}})
            mounts.append({"name": source, "mountPath": target})
            continue
        source, target = folder / each["source"], Path(each["target"])
        assert source.exists() or each["bind"]["create_host_path"], source
        if source.is_file():
            content, target = {target.name: source.read_text(encoding="utf-8")}, target.parent
        else:
            content = {path.name: path.read_text(encoding="utf-8") for path in source.iterdir()}
        place = f"{name}-{target.name}"
        files.append({"kind": "ConfigMap", "metadata": {"name": place}, "data": content})
        volumes.append({"name": place, "configMap": {"name": place}})
        mounts.append({"name": place, "mountPath": str(target), "readOnly": each["read_only"]})
    for target in service.get("tmpfs", []):
        volumes.append({"name": "tmp", "emptyDir": {}})
        mounts.append({"name": "tmp", "mountPath": target})
    return files, volumes, mounts


def _probe(healthcheck: Service) -> Object:
    """Returns a health check as a probe. The request of wget, which not every machine has, becomes
    that of the kubelet.
    """
    kind, *command = healthcheck["test"]
    assert kind == "CMD"
    probe: Object = {"timeoutSeconds": seconds(healthcheck["timeout"])}
    if command[0] != "wget":
        return probe | {"exec": {"command": command}}
    request = _URL.fullmatch(command[-1])
    assert request, command
    return probe | {"httpGet": {"port": int(request[1]), "path": request[2]}}
