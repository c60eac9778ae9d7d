"""Bills of materials (CycloneDX) of the client and of both images, from the locked requirements.

    python -m release.sbom DIST PYTHON < DEBIAN    runs in the environment of requirements/dist.txt

The packages, versions and hashes are those of requirements/: the hashes of all files that pip
accepts. Licences and the graph are those of the packages that PYTHON has installed. DEBIAN lists
the Debian packages of the image of api and gateway, if it was built: name, version, architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.utils import canonicalize_name, parse_wheel_filename

from release.locked import Locked, locked

SCHEMA: Final = SchemaVersion.V1_6
CLIENT, SERVICE = "img2img-client", "img2img-service"
DEBIAN: Final = "debian-12"


class Installed:
    """The packages of an environment: their licences and dependencies."""

    def __init__(self, python: str) -> None:
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
        done = subprocess.run([*command, python], check=True, stdout=subprocess.PIPE, text=True)
        bom = Bom.from_json(json.loads(done.stdout))
        self._components = {canonicalize_name(each.name): each for each in bom.components}
        names = {each.bom_ref.value: name for name, each in self._components.items()}
        self._needs = {
            names[each.ref.value]: {names[other.ref.value] for other in each.dependencies}
            for each in bom.dependencies
            if each.ref.value in names
        }

    def component(self, name: str) -> Component | None:
        """Returns the package, or None if it is not installed."""
        return self._components.get(name)

    def needs(self, name: str) -> set[str]:
        """Returns the packages that a package needs itself, with those of all its extras."""
        return self._needs.get(name, set())


def component(package: Locked, installed: Installed) -> Component:
    """Returns a package with its hashes, and its licences if they are known."""
    known = installed.component(package.name)
    purl = PackageURL("pypi", name=package.name, version=package.version)
    return Component(
        type=ComponentType.LIBRARY,
        name=package.name,
        version=package.version,
        bom_ref=str(purl),
        purl=purl,
        description=known.description if known else None,
        licenses=known.licenses if known else (),
        external_references=[
            ExternalReference(
                type=ExternalReferenceType.DISTRIBUTION,
                url=XsUri(str(purl)),
                comment="SHA-256 of the files that an installation accepts",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=h) for h in package.hashes],
            )
        ],
    )


def wheels(dist: Path) -> Iterator[Locked]:
    """Returns our own wheels, the client first."""
    for path in sorted(dist.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(path.name)
        digest = sha256(path.read_bytes()).hexdigest()
        yield Locked(canonicalize_name(name), str(version), (digest,))


def debian_components(lines: Iterable[str]) -> Iterator[Component]:
    """Returns the Debian packages of an image."""
    for line in lines:
        name, version, architecture = line.split()
        qualifiers = {"arch": architecture, "distro": DEBIAN}
        purl = PackageURL("deb", "debian", name, version, qualifiers)
        yield Component(
            type=ComponentType.LIBRARY, name=name, version=version, bom_ref=str(purl), purl=purl
        )


def bill(
    root: Component,
    needed: Iterable[str],
    packages: Iterable[Locked],
    installed: Installed,
    others: Iterable[Component] = (),
) -> Bom:
    """Returns the bill of a product: its packages, and which package needs which one.

    Args:
        needed: The names of the packages that the product needs itself.
        others: Packages that are not Python's.
    """
    components = {each.name: component(each, installed) for each in packages}
    epoch = int(os.environ["SOURCE_DATE_EPOCH"])
    contained = [*components.values(), *others]
    listed = sorted(str(each.purl) for each in contained)
    bom = Bom(components=contained)
    bom.serial_number = uuid5(NAMESPACE_URL, f"{root.name}@{root.version} {epoch} {listed}")
    bom.metadata.component = root
    bom.metadata.timestamp = datetime.fromtimestamp(epoch, UTC)
    edges = {name: installed.needs(name) for name in components}
    for each, names in [(root, needed), *((components[name], edges[name]) for name in edges)]:
        found = sorted(components.keys() & set(names))
        bom.register_dependency(each, [components[name] for name in found])
    bom.register_dependency(root, contained[len(components) :])
    return bom


def write(bom: Bom, path: Path) -> None:
    """Writes a bill. Raises ValueError if it breaks the schema of CycloneDX."""
    text = make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string(indent=1)
    if error := JsonStrictValidator(SCHEMA).validate_str(text):
        raise ValueError(f"{path.name} is not valid: {error}")
    path.write_text(text + "\n", encoding="utf-8")


def image(version: str) -> Component:
    """Returns the component that stands for an image."""
    return Component(
        type=ComponentType.CONTAINER, name=SERVICE, version=version, bom_ref=f"{SERVICE}:{version}"
    )


def main(dist: Path, python: str) -> int:
    """Writes the bills of the wheels in a folder."""
    installed, debian = Installed(python), list(debian_components(sys.stdin))
    client, service = wheels(dist)
    slim, full = f"{service.version}-slim", service.version
    contents = {
        f"img2img_client-{client.version}": (
            component(client, installed),
            installed.needs(CLIENT),
            locked("client.txt").values(),
            [],
        ),
        f"{SERVICE}-{slim}": (
            image(slim),
            [SERVICE],
            [*locked("server.txt").values(), client, service],
            debian,
        ),
        f"{SERVICE}-{full}": (
            image(full),
            [SERVICE],
            [*locked("worker.txt", "torch.txt").values(), client, service],
            [],
        ),
    }
    for name, (root, needed, packages, others) in contents.items():
        write(bill(root, needed, packages, installed, others), dist / f"{name}.cdx.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
