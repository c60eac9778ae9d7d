"""The examples of docs/client.md work."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

import img2img_client
from img2img_client import errors
from img2img_client.cli import main
from tests.fake_job import events
from tests.fake_service import FakeService, serving
from tests.readme import ROOT, blocks
from tests.stack import photo

PAGE = ROOT / "docs/client.md"
LINES = "".join(block.text for block in blocks(PAGE, "sh")).replace("\\\n", "").splitlines()
REDIRECTS = re.compile(r" [<>|] .*")  # a shell reads these, the command does not
COMMANDS = [shlex.split(REDIRECTS.sub("", line))[1:] for line in LINES]
BLOCKS = [block.text for block in blocks(PAGE, "python")]
OWN_SERVICE = [text for text in BLOCKS if "running_service" in text]
SNIPPETS = [text for text in BLOCKS if text not in OWN_SERVICE]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_on_the_page_parses(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    # click caches the help option of a command with the command's first context, so a parent is
    # needed: only `main` defines -h as help.
    with main.make_context("img2img", list(words)) as parent:
        command = main.commands[words[0]]
        if isinstance(command, click.Group):
            words = words[1:]
            command = command.commands[words[0]]
        with command.make_context(words[0], words[1:], parent=parent) as context:
            assert isinstance(context, click.Context)


def test_the_page_lists_every_command_of_admin() -> None:
    shown = {words[1] for words in COMMANDS if words[0] == "admin"}
    group = main.commands["admin"]
    assert isinstance(group, click.Group)
    assert shown == set(group.commands)


def test_the_printed_job_on_the_page_has_real_fields() -> None:
    [block] = blocks(PAGE, "json")
    shown = json.loads(block.text)
    [printed] = [json.loads((ROOT / "tests/golden/cli/generate.json").read_text())]
    assert shown.keys() <= printed.keys()
    for part in ("spec", "timings"):
        assert shown[part].keys() <= printed[part].keys()
    assert shown["samples"][0].keys() == printed["samples"][0].keys()


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_python_block_of_the_page_runs(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    monkeypatch.chdir(tmp_path)
    service = FakeService(log=events(samples=2))
    with serving(service) as port:
        text = SNIPPETS[number].replace("127.0.0.1:50051", f"127.0.0.1:{port}")
        exec(compile(text, f"{PAGE.name} block {number}", "exec"), {"__name__": "__main__"})
    assert len(service.request_ids) == text.count("seed=n") + 1


def test_the_example_of_a_test_on_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo())
    monkeypatch.chdir(tmp_path)
    [text] = OWN_SERVICE
    exec(compile(text, PAGE.name, "exec"), {"__name__": "__main__"})


def test_every_error_is_in_the_table_and_is_exported() -> None:
    text = PAGE.read_text(encoding="utf-8")
    concrete = [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type)
        and issubclass(value, errors.Img2ImgError)
        and name not in ("Img2ImgError", "RpcError", "JobEndError")
    ]
    assert [name for name in concrete if f"`{name}`" not in text] == []
    assert set(concrete) <= set(vars(img2img_client))
