"""The GPU benchmark: a part that fails or has no time does not affect other parts, and all needed
files are included.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from benchmarks import engine_device
from benchmarks.engine_device import Report, Rows
from tests.packages import closure
from tests.readme import ROOT


def whole() -> Iterator[tuple[str, Rows]]:
    yield "hardware", {"device": "abacus"}
    yield "step", {"1": {"ms": 1.5}}
    yield "step", {"2": {"ms": 2.5, "share": 0.5}}


def broken() -> Iterator[tuple[str, Rows]]:
    yield "request", {"1": {"ms": 7}}
    raise RuntimeError("out of luck")


def dead() -> Iterator[tuple[str, Rows]]:
    sys.exit(3)


def endless() -> Iterator[tuple[str, Rows]]:
    threading.Event().wait()
    yield "step", {}


def test_what_fails_or_takes_too_long_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "results" / "report.json"
    report = Report(["toy: a", "toy: b", "toy: c", "toy: d", "toy: e"], output)

    report.run("toy", "a", broken, 60.0)
    report.run("toy", "b", endless, 0.5)
    report.run("toy", "c", dead, 60.0)
    report.run("toy", "d", whole, 60.0)

    found = json.loads(output.read_text(encoding="utf-8"))
    trace = found["failed"].pop("toy: a")
    assert trace.endswith("RuntimeError: out of luck\n")
    del found["command"]
    assert found == {
        "hardware": {"device": "abacus"},
        "results": {
            "toy": {
                "request": {"1": {"ms": 7}},
                "step": {"1": {"ms": 1.5}, "2": {"ms": 2.5, "share": 0.5}},
            }
        },
        "left_out": ["toy: e"],
        "failed": {"toy: b": "not done after 0 s", "toy: c": "its process ended with 3"},
    }
    lines = output.with_suffix(".md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "device: abacus"
    assert lines[lines.index("**step**") + 2 :] == [
        "| | ms | share |",
        "|---|---|---|",
        "| 1 | 1.5 |  |",
        "| 2 | 2.5 | 0.5 |",
        "",
        "## Not measured",
        "",
        "- toy: a: RuntimeError: out of luck",
        "- toy: b: not done after 0 s",
        "- toy: c: its process ended with 3",
        "- toy: e: no time was left",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "--architectures flux-schnell --parts eager",
            [("flux-schnell", "eager")],
        ),
        (
            "--architectures sd15 sd35-medium --loaded sd15 --no-compile",
            [("sd15", "eager"), ("sd35-medium", "eager"), ("sd15", "mixed load")],
        ),
        (
            "--tiny --parts compiled_steps",
            [(name, "compiled steps") for name in engine_device.TOYS],
        ),
    ],
)
def test_parts_can_run_alone(words: str, expected: list[tuple[str, str]]) -> None:
    given = [word.replace("_", " ") for word in words.split()]

    assert engine_device.plan(engine_device.parsed(given)) == expected


@pytest.mark.slow
def test_the_packages_that_are_collected_are_all_that_it_needs(tmp_path: Path) -> None:
    script = (ROOT / "benchmarks" / "device.sh").read_text(encoding="utf-8")
    words = dict(re.findall(r"^(packages|alone|unneeded)='(.+)'$", script, re.MULTILINE))
    collected = {*words["packages"].split(), "torch"}
    collected |= set().union(*(closure(name) for name in collected))
    collected |= set(words["alone"].split())
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in collected - {canonicalize_name(name) for name in words["unneeded"].split()}:
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            link = bare / top
            if not link.exists():
                link.symlink_to(str(package.locate_file(top)))
    output = tmp_path / "report.json"
    # -S excludes the packages of this environment.
    command = f"{sys.executable} -S -m benchmarks.engine_device --architectures toy --loaded"
    command += f" --no-compile --device cpu --side 64 --batches 1 --repeats 1 --output {output}"
    paths = (bare, ROOT, ROOT / "proto" / "gen", ROOT / "server")

    subprocess.run(
        command.split(),
        env={"PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.DEVNULL,
        check=True,
    )

    found = json.loads(output.read_text(encoding="utf-8"))
    assert (found["failed"], found["left_out"]) == ({}, [])
    tables = {title: list(rows) for title, rows in found["results"]["toy"].items()}
    assert tables == {
        "step by rows, eager": ["1"],
        "one request by steps, eager": ["1", "2", "3", "4"],
    }
