"""The parts of `make dist`: the same bytes at every build, sums, notes and locked packages."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from release import __main__ as main
from release import chart, image, python
from release.commands import ReleaseError, source_epoch
from release.locked import locked
from release.notes import notes
from tests.readme import ROOT

EPOCH = 1_700_000_000
CHANGELOG = "# Changelog\n\n## 0.2.0 (2027-01-02)\n\n### Added\n\n- Two.\n\n## [0.1.0]\n\n- One.\n"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_builds_of_the_client_have_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python, "DISTRIBUTIONS", {"img2img_client": ROOT / "client"})
    for name in ("first", "second"):
        python.build(tmp_path / name, EPOCH)
        python.check_sources(tmp_path / name, EPOCH)
    first = content(tmp_path / "first")
    assert sorted(name.rpartition("-")[2] for name in first)[1] == "any.whl"
    assert first == content(tmp_path / "second")


def test_a_source_distribution_that_builds_another_wheel_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python, "DISTRIBUTIONS", {"img2img_client": ROOT / "client"})
    python.build(tmp_path, EPOCH)
    with pytest.raises(ReleaseError, match="builds another wheel"):
        python.check_sources(tmp_path, EPOCH + 86_400)


def test_the_chart_package_does_not_depend_on_the_times_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not chart.HELM.exists():
        pytest.skip("helm is not in .tools/: run `make chart` once")
    first = chart.build(tmp_path, EPOCH).read_bytes()
    copy = shutil.copytree(chart.CHART, tmp_path / chart.CHART.name)
    for path in copy.rglob("*"):
        os.utime(path, (EPOCH + 500, EPOCH + 500))
    monkeypatch.setattr(chart, "CHART", copy)
    assert chart.build(tmp_path, EPOCH).read_bytes() == first


def test_a_chart_package_that_renders_differently_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not chart.HELM.exists():
        pytest.skip("helm is not in .tools/: run `make chart` once")
    others = [path.name for path in chart.CHART.glob("ci/*") if "default" not in path.name]
    ignored = shutil.ignore_patterns(*others)
    copy = shutil.copytree(chart.CHART, tmp_path / chart.CHART.name, ignore=ignored)
    monkeypatch.setattr(chart, "CHART", copy)
    package = chart.build(tmp_path, EPOCH)
    chart.check(package)
    settings = copy / "templates" / "settings.yaml"
    settings.write_text(settings.read_text().replace("-settings", "-other"), encoding="utf-8")
    with pytest.raises(ReleaseError, match=r"renders default-values\.yaml differently"):
        chart.check(package)


def test_sha256sum_accepts_the_sums_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"wheel")
    (tmp_path / "b.tgz").write_bytes(b"chart")
    main.write_sums(tmp_path)
    done = subprocess.run(
        ["sha256sum", "--check", main.SUMS], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "a.whl: OK\nb.tgz: OK\n")


def test_a_folder_with_other_files_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ReleaseError, match="choose another --output"):
        main.make_empty(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    main.write_sums(tmp_path)
    main.make_empty(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_notes_are_the_part_of_the_changelog() -> None:
    assert notes(CHANGELOG, "0.2.0") == "### Added\n\n- Two.\n"
    assert notes(CHANGELOG, "0.1.0") == "- One.\n"
    with pytest.raises(ReleaseError, match=r"no part about version 0\.3\.0"):
        notes(CHANGELOG, "0.3.0")


def test_files_get_the_chosen_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(EPOCH))
    assert source_epoch() == EPOCH


@pytest.mark.parametrize("role", ["client", "server", "worker", "torch"])
def test_every_locked_package_of_the_platform_is_read_with_its_hashes(role: str) -> None:
    found = locked(f"{role}.txt")
    text = (ROOT / "requirements" / f"{role}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "==" in line]
    here = {line.partition("==")[0] for line in lines if " ; " not in line}
    assert here <= set(found)
    for package in found.values():
        assert package.version
        assert {len(digest) for digest in package.hashes} == {64}, package


def test_packages_of_other_platforms_are_not_read() -> None:
    text = (ROOT / "requirements" / "worker.txt").read_text(encoding="utf-8")
    assert "sys_platform == 'win32'" in text
    assert "colorama" not in locked("worker.txt")
    assert {"grpcio", "fastapi", "diffusers"} <= set(locked("worker.txt"))


def test_the_reason_that_a_machine_builds_no_images_names_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert image.missing() == "it needs root"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "mmdebstrap" else tool)
    assert image.missing() == "it needs mmdebstrap (Debian: apt-get install)"
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    assert image.missing("podman") == ""


def test_an_image_that_is_skipped_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "missing", lambda: "it needs root")
    options = argparse.Namespace(skip_image=False, full=False)
    packages, skipped = main.images(tmp_path, "0.1.0", main.Steps(), options)
    assert packages == ""
    assert skipped == [
        "the image of api and gateway: it needs root",
        "the image of the worker: it needs root",
    ]
