"""Runs the command img2img in this process against a scripted service."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from img2img_client.cli import main
from tests.fake_service import FakeService, serving

REQUEST = ("generate", "--prompt", "p", "--init-image", "photo.jpg")


@pytest.fixture
def in_a_folder_with_a_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TZ", "UTC")
    for name in ("IMG2IMG_SERVER", "IMG2IMG_API_KEY", "IMG2IMG_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMG2IMG_CONFIG", str(tmp_path / "config.toml"))
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def run(service: FakeService, *words: str) -> Result:
    with serving(service) as port:
        return CliRunner().invoke(main, [*words, "--server", f"127.0.0.1:{port}"])
