"""The version and the address of the project: the same in all files, and written to all of them."""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from release import identity
from release.identity import REPOSITORY, VALUES, VERSION, Value
from tests.readme import ROOT

OTHER = {VERSION.name: "19.8.77", REPOSITORY.name: "https://git.example.org/a-team/tools/img2img"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Returns a folder with the files that have the values."""
    for path in {copies.path for value in VALUES for copies in value.copies}:
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    return tmp_path


def test_all_files_have_the_values_of_pyproject() -> None:
    assert identity.faults() == []


def test_the_installed_distributions_have_the_version_of_the_project() -> None:
    for name in ("img2img-service", "img2img-client"):
        assert metadata.version(name) == VERSION.read(ROOT)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.name)
def test_a_new_value_is_written_to_all_places(value: Value, copy: Path) -> None:
    before = value.read(copy)
    value.write(copy, OTHER[value.name])
    assert identity.faults(copy) == []
    for copies in value.copies:
        assert OTHER[value.name] in (copy / copies.path).read_text(encoding="utf-8")
    value.write(copy, before)
    for copies in value.copies:
        assert (copy / copies.path).read_bytes() == (ROOT / copies.path).read_bytes()


def test_a_copy_that_differs_is_reported_with_its_file(copy: Path) -> None:
    chart = copy / "helm/img2img/Chart.yaml"
    text = chart.read_text(encoding="utf-8")
    chart.write_text(text.replace("appVersion: ", "appVersion: 9"), encoding="utf-8")
    expected = VERSION.read(ROOT)
    assert identity.faults(copy) == [
        f"helm/img2img/Chart.yaml: the version is 9{expected}, in pyproject.toml {expected}"
    ]


@pytest.mark.parametrize("value", ["0.2", "0.2.0rc1", "v0.2.0", "0.2.0-rc.1"])
def test_a_version_that_charts_or_packages_do_not_allow_is_refused(value: str, copy: Path) -> None:
    with pytest.raises(ValueError, match=r"is not X\.Y\.Z"):
        VERSION.write(copy, value)
    assert identity.faults(copy) == []


def test_the_address_of_the_project_is_in_no_other_file() -> None:
    known = {copies.path for copies in REPOSITORY.copies}
    command = ["git", "-C", str(ROOT), "grep", "-l", "--fixed-strings", REPOSITORY.read(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 128:
        pytest.skip(f"not a git repository: {done.stderr.strip()}")
    assert set(done.stdout.splitlines()) - known == set()
