"""A worker logs that its catalogue has changed."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from img2img_server.settings import Settings
from img2img_server.worker.catalogue_watch import CatalogueWatch

ONE = '[[models]]\nname = "one"\nsource = "acme/one"\n'
TWO = ONE + ONE.replace("one", "two")


@pytest.fixture
def watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> CatalogueWatch:
    caplog.set_level(logging.INFO)
    (tmp_path / "models.toml").write_text(ONE)
    return CatalogueWatch(Settings(models_file=tmp_path / "models.toml"))


def test_each_change_of_the_file_is_logged_once(
    watch: CatalogueWatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for text in (ONE, TWO, TWO, ONE, ONE):
        (tmp_path / "models.toml").write_text(text)
        watch.look()
    changed, restored = (record.getMessage() for record in caplog.records)
    assert changed.startswith(f"catalogue_changed: {tmp_path}/models.toml has changed")
    assert "restart it to apply the change" in changed
    assert restored.startswith("catalogue_restored: ")


def test_mistakes_in_the_changed_file_are_logged_before_a_restart_fails(
    watch: CatalogueWatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "models.toml").write_text(ONE.replace("source", "sourec"))
    watch.look()
    (tmp_path / "models.toml").unlink()
    watch.look()
    watch.look()
    wrong, missing = (record.getMessage() for record in caplog.records)
    assert "entry one: sourec: there is no such field" in wrong
    assert missing.startswith("catalogue_broken: the worker keeps its models, but cannot start ")
    assert "No such file" in missing


async def test_the_file_is_looked_at_again_and_again(
    watch: CatalogueWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("img2img_server.worker.catalogue_watch.PAUSE_SECONDS", 0.0)
    logged = asyncio.Event()
    loop = asyncio.get_running_loop()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda _: loop.call_soon_threadsafe(logged.set))
    logger = logging.getLogger("img2img_server.worker.catalogue_watch")
    logger.addHandler(handler)
    following = asyncio.create_task(watch.follow())
    (tmp_path / "models.toml").write_text(TWO)
    try:
        await asyncio.wait_for(logged.wait(), 10)
    finally:
        logger.removeHandler(handler)
        following.cancel()
