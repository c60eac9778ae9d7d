"""`img2img-server doctor` on many broken and some valid forms of models, as people have them."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from benchmarks.local_stack import free_port
from img2img_server.__main__ import main
from tests.doctor_forms import (
    additions,
    catalogues,
    damaged_files,
    single_files,
    valid_forms,
    wrong_models,
    wrong_places,
)
from tests.doctor_forms.forms import FORMS, Builder, Form, Settings, Stock, matches

MODULES = (
    additions,
    catalogues,
    damaged_files,
    single_files,
    valid_forms,
    wrong_models,
    wrong_places,
)
# Of CPU time, which other processes on the machine do not change.
SECONDS = 10.0
# Bits of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
_READ_EVERYTHING = 0b110
_CAPABILITY_VERSION = 0x20080522
# Words of the implementation, with which a user can do nothing.
INTERNAL = r"Traceback|\b\w+(?:Error|Exception)\b|File \"|<class |\bNone\b|\bstate_dict\b"


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    return Stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture
def _settings_only_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("IMG2IMG_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("IMG2IMG_WARM_UP_SIZES", "256x256")
    monkeypatch.setenv("IMG2IMG_DEVICE", "cpu")


def test_the_corpus_has_broken_and_valid_forms() -> None:
    assert sum(form.says is not None for form in FORMS.values()) >= 35
    assert sum(form.says is None for form in FORMS.values()) >= 6
    assert {form.build.__module__ for form in FORMS.values()} == {it.__name__ for it in MODULES}


@pytest.mark.usefixtures("_settings_only_of_the_test")
@pytest.mark.parametrize("name", sorted(FORMS))
def test_doctor_says_what_is_wrong_with_a_form_and_what_to_do(
    name: str, stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMS[name]
    settings = form.build(Builder(tmp_path, stock))
    for key, value in settings.items():
        monkeypatch.setenv(f"IMG2IMG_{key}", str(value))
    began = time.process_time()

    with _as_another_user() if name.startswith("unreadable") else _as_this_user():
        result = CliRunner().invoke(main, ["doctor", "--json"])

    seconds = time.process_time() - began
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.stderr
    assert seconds < SECONDS
    assert not (tmp_path / "code-ran").exists()
    # Words in the names of the folders of the tests must not match.
    report = json.loads(result.stdout.replace(f"{tmp_path}/", ""))
    _check(form, report, result.exit_code)


def _check(form: Form, report: Any, status: int) -> None:
    sentences = list(_sentences(report))
    shown = "\n".join(sentences)
    if form.starts is not None:
        assert (status == 0) == form.starts, shown
    assert status in (0, 1, 2)
    if form.says is None:
        assert _problems(report) == []
        return
    assert any(
        all(matches(pattern, it) for pattern in (*form.says, form.advice))
        and not re.search(INTERNAL, it)
        for it in sentences
    ), f"none has all of {form.says} and an advice:\n{shown}"


def _sentences(report: Any) -> Iterator[str]:
    if isinstance(report, Mapping):
        for value in report.values():
            yield from _sentences(value)
    elif isinstance(report, list):
        for value in report:
            yield from _sentences(value)
    elif isinstance(report, str) and report.count(" ") >= 3:
        yield report


def _problems(report: Any) -> list[str]:
    if isinstance(report, list):
        return [it for value in report for it in _problems(value)]
    if not isinstance(report, Mapping):
        return []
    found = []
    for key, value in report.items():
        is_problem = re.search("problem|refused|error|unreadable|warning", key) is not None
        found += [str(value)] if is_problem and value else _problems(value)
    return found


@contextmanager
def _as_this_user() -> Iterator[None]:
    yield


@contextmanager
def _as_another_user() -> Iterator[None]:
    """Drops root's capabilities to read every file; threads that start now have none either."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] &= ~_READ_EVERYTHING
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


def _process(settings: Settings) -> subprocess.CompletedProcess[str]:
    clean = {key: it for key, it in os.environ.items() if not key.startswith(("IMG2IMG", "LC_"))}
    chosen = {
        "WARM_UP_SIZES": "256x256",
        "DEVICE": "cpu",
        **{key: str(it) for key, it in settings.items()},
    }
    return subprocess.run(
        [sys.executable, "-m", "img2img_server", "doctor"],
        env={
            **clean,
            "LC_ALL": "C",
            **{f"IMG2IMG_{key}": it for key, it in chosen.items()},
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
        check=False,
    )


@pytest.mark.usefixtures("_settings_only_of_the_test")
def test_the_command_prints_a_problem_as_text(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMS["cut_weights"]
    monkeypatch.setenv("IMG2IMG_MODEL", str(form.build(Builder(tmp_path, stock))["MODEL"]))

    done = CliRunner().invoke(main, ["doctor"])

    expected = (*(form.says or ()), form.advice)
    lines = done.stdout.replace(f"{tmp_path}/", "").splitlines()
    assert done.exit_code == 1
    assert any(all(matches(it, line) for it in expected) for line in lines), done.stdout
    assert not re.search(INTERNAL, done.output)


def test_the_command_prints_paths_with_other_letters_in_any_locale(
    stock: Stock, tmp_path: Path
) -> None:
    settings = FORMS["spaces_and_other_letters_in_paths"].build(Builder(tmp_path, stock))

    done = _process(settings)

    assert done.returncode == 0, done.stderr
    assert "naïve style" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("_settings_only_of_the_test")
def test_a_misspelt_relative_path_is_no_model_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("IMG2IMG_MODEL", "models/dreemy")

    done = CliRunner().invoke(main, ["doctor", "--json"])

    [sentence, *_] = [it for it in _sentences(json.loads(done.stdout)) if "models/dreemy" in it]
    assert done.exit_code in (1, 2)
    assert matches("folder|directory|file|path", sentence)
    assert matches("hub", sentence)
    assert not re.search(INTERNAL, done.output)
