"""The content of a pod's containers: command, environment and files. See kubelet.py."""

from __future__ import annotations

import base64
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from tests.chart_render import ROOT, Object, Pod, of_kind


def config(objects: list[Object], kind: str, name: str) -> dict[str, bytes]:
    """Returns the entries of a ConfigMap or Secret."""
    found = of_kind(objects, kind)[name]
    texts = {**found.get("data", {}), **found.get("stringData", {})}
    content = {key: text.encode() for key, text in texts.items()}
    for key, text in found.get("binaryData", {}).items():
        content[key] = base64.b64decode(text)
    return content


class PodContent:
    """The content of one pod, whose volumes are in `folder`. `ports`: replaced ports."""

    def __init__(
        self, objects: list[Object], pod: Pod, address: str, ports: dict[int, int], folder: Path
    ) -> None:
        self._objects = objects
        self._pod = pod
        self._address = address
        self._ports = ports
        self._folder = folder

    def command(self, container: Object) -> list[str]:
        """Returns the command and its arguments."""
        return [self.own(each) for each in (*container["command"], *container["args"])]

    def own(self, text: str) -> str:
        """Returns a text of the manifest with the pod's address and ports."""
        for port, instead in self._ports.items():
            text = re.sub(rf"\b{port}\b", str(instead), text)
        return text.replace("0.0.0.0", self._address).replace("127.0.0.1", self._address)

    def environment(self, container: Object) -> dict[str, str]:
        """Returns the command of the manifest, with the paths of this machine."""
        found = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
        if "PYTHONPATH" in os.environ:
            found["PYTHONPATH"] = os.environ["PYTHONPATH"]
        for source in container.get("envFrom", []):
            name = source["configMapRef"]["name"]
            held = config(self._objects, "ConfigMap", name)
            found |= {key: value.decode() for key, value in held.items()}
        for each in container.get("env", []):
            value = each["value"] if "value" in each else self._value(each["valueFrom"], container)
            found[each["name"]] = value
        return {key: self.own(value) for key, value in found.items()}

    def _value(self, source: Object, container: Object) -> str:
        match source:
            case {"secretKeyRef": {"name": name, "key": key}}:
                return config(self._objects, "Secret", name)[key].decode()
            case {"fieldRef": {"fieldPath": "metadata.name"}}:
                return f"{self._pod.name}-0"
            case {"resourceFieldRef": {"resource": "limits.cpu"}}:
                return str(math.ceil(float(container["resources"]["limits"]["cpu"])))
        raise AssertionError(f"unknown source of a value: {source}")

    def make_volumes(self, owner: int) -> None:
        """Writes the files of ConfigMaps and Secrets. An empty folder belongs to `owner`."""
        for volume in self._pod.spec["volumes"]:
            place = self._folder / volume["name"]
            place.mkdir(parents=True, exist_ok=True)
            for name, content in self._files(volume).items():
                (place / name).write_bytes(content)
            if "emptyDir" in volume:
                os.chown(place, owner, -1)

    def _files(self, volume: dict[str, Any]) -> dict[str, bytes]:
        match volume:
            case {"configMap": {"name": name}}:
                files = config(self._objects, "ConfigMap", name)
            case {"secret": {"secretName": name}}:
                files = config(self._objects, "Secret", name)
            case {"emptyDir": _}:
                return {}
            case _:
                raise AssertionError(f"unknown volume: {volume}")
        items = volume.get("secret", volume.get("configMap", {})).get("items")
        if items:
            files = {each["path"]: files[each["key"]] for each in items}
        return {
            name: self.own(content.decode()).encode() if name.endswith(".conf") else content
            for name, content in files.items()
        }

    def mounts(self, container: Object) -> list[str]:
        """Returns the lines of MOUNTS for pod_root.sh."""
        lines = [
            f"{mode(each)} {self._folder / each['name']} {each['mountPath']}\n"
            for each in container["volumeMounts"]
        ]
        # The files of the image: the interpreter, its packages and this repository.
        image = {Path(sys.base_prefix), Path(sys.prefix).resolve(), ROOT}
        return lines + [f"ro {each} {each}\n" for each in sorted(image)]


def mode(mount: Object) -> str:
    """Returns how a volume is mounted: ro or rw."""
    return "ro" if mount.get("readOnly") else "rw"
