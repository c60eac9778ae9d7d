"""The make targets: the commands that each would run on a machine where nothing is installed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.readme import ROOT

# pip may install files whose hash is known, the pinned version of torch, and the project itself.
PINNED = re.compile(
    r"--require-hashes|-c constraints.txt torch$|--no-deps .*-e ('\.\[\w+\]'|\./client)$"
)


def planned(word: str) -> str:
    """Returns the commands of `make TARGET` if everything were out of date; runs nothing."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", word]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("word", ["demo", "serve"])
def test_trying_the_service_installs_no_development_tools(word: str) -> None:
    plan = planned(word)
    assert "-m venv .venv" in plan
    assert "-e '.[local]'" in plan
    assert "[dev]" not in plan
    assert "npm" not in plan


@pytest.mark.parametrize(
    "word", ["test", "check", "fix", "gen", "gold", "bench", "attack", "chaos"]
)
def test_every_development_word_sets_everything_up_first(word: str) -> None:
    plan = planned(word).splitlines()
    installs = next(number for number, line in enumerate(plan) if "-e '.[dev]'" in line)
    works = [number for number, line in enumerate(plan) if line.startswith((".venv/bin/", "GOLD="))]
    unpinned = [line for line in plan if "-m pip" in line and not PINNED.search(line)]
    assert unpinned == []
    assert min(number for number in works if "-m pip" not in plan[number]) > installs


def test_check_changes_nothing() -> None:
    plan = planned("check")
    assert "--fix" not in plan
    for writer in ("ruff format", "proto/generate.py", "docs/generate_settings.py"):
        lines = [line for line in plan.splitlines() if writer in line]
        assert len(lines) == 1
        assert "--check" in lines[0]


def test_nothing_is_installed_outside_the_folder() -> None:
    plan = "\n".join(planned(word) for word in ("demo", "test", "check"))
    assert "sudo" not in plan
    assert "--user" not in plan
    assert "--global" not in plan


def test_a_module_runs_in_one_process_so_that_its_fixtures_are_made_once() -> None:
    modules = ("tests/unit/test_job.py", "tests/unit/test_params.py")
    (command,) = [line for line in planned("test").splitlines() if "-m pytest" in line]
    options = command.split("-m pytest")[1].split()
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-v", "-p", "no:cacheprovider", *modules],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    places = re.findall(r"^\[(gw\d)\].* (tests/unit/\w+\.py)::", ran.stdout, re.MULTILINE)
    assert len(set(places)) == len(modules) < len(places)


def test_modules_that_measure_run_one_after_the_other(pytestconfig: pytest.Config) -> None:
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert conftest is not None
    places = ("integration/test_real_sdk", "integration/test_attack", "unit/test_start")
    groups = [conftest.group_of(f"tests/{place}.py::test_a[b::c]") for place in places]
    assert groups == ["measures", "measures", "tests/unit/test_start.py"]
