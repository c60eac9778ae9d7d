"""The safety checker in a model directory: a small one with random weights."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import photos
import pytest

from img2img_server.errors import SafetyCheckError
from img2img_server.imaging.base import Pixels
from img2img_server.safety import safety_checker
from img2img_server.safety.base import blank
from img2img_server.safety.model import ModelChecker
from img2img_server.safety.nsfw import NsfwChecker
from img2img_server.settings import Settings
from tests.tiny_safety import write_checker
from tests.unit.test_safety import finished


@pytest.mark.parametrize(("margin", "score"), [(0.01, 1.0), (-0.01, 0.0)])
async def test_the_models_own_thresholds_decide(
    margin: float, score: float, tmp_path: Path
) -> None:
    photo = photos.photo()
    checker = ModelChecker(str(write_checker(tmp_path, margin=margin, photo=photo)))
    await checker.warm_up()
    before = photo.copy()
    assert checker.check(photo) == score
    assert np.array_equal(photo, before)


@pytest.mark.parametrize(("margin", "blanked"), [(0.01, True), (-0.01, False)])
async def test_an_image_that_it_flags_is_blanked_everywhere(
    margin: float, blanked: bool, tmp_path: Path
) -> None:
    photo = photos.photo()
    checker = ModelChecker(str(write_checker(tmp_path, margin=margin, photo=photo)))
    threshold = Settings.model_fields["safety_threshold"].default
    flagged, sent, stored = await finished(checker, threshold, photo)
    expected = blank(photo) if blanked else photo
    assert flagged is blanked
    assert np.array_equal(sent, expected)
    assert np.array_equal(stored, expected)


async def test_images_that_wait_for_the_checker_hold_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker, loop = ModelChecker("not loaded"), asyncio.get_running_loop()
    began, entered, go = asyncio.Event(), [0], threading.Event()

    def check(_: Pixels) -> float:
        entered[0] += 1
        loop.call_soon_threadsafe(began.set)
        assert go.wait(30)
        return 0.0

    monkeypatch.setattr(checker, "check", check)
    with ThreadPoolExecutor(2) as pool:
        loop.set_default_executor(pool)
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(finished(checker, 0.5, photos.photo()))
            await began.wait()
            await asyncio.to_thread(int)  # A thread is free for other work.
            assert entered == [1]
            go.set()
    assert entered == [3]


async def test_a_model_without_a_checker_fails_the_start_and_the_check(tmp_path: Path) -> None:
    checker = ModelChecker(str(tmp_path))
    with pytest.raises(SafetyCheckError, match="the safety checker cannot be loaded"):
        await checker.warm_up()
    with pytest.raises(SafetyCheckError, match="cannot be loaded"):
        checker.check(photos.photo())


def test_a_check_that_breaks_in_the_middle_fails(tmp_path: Path) -> None:
    folder = write_checker(tmp_path, margin=0.01, photo=photos.photo())
    with pytest.raises(SafetyCheckError, match="the safety check cannot run"):
        ModelChecker(str(folder)).check(np.zeros((3, 4, 5, 6), np.uint8))


def test_the_setting_chooses(tmp_path: Path) -> None:
    assert isinstance(safety_checker(Settings(), str(tmp_path)), NsfwChecker)
    chosen = safety_checker(Settings(safety_checker="model"), str(tmp_path))
    assert isinstance(chosen, ModelChecker)
    with pytest.raises(ValueError, match="safety_checker"):
        Settings(safety_checker="off")
