"""Images that are copied from the device: the copy delays no step, and events keep their order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from img2img_server.domain.events import StageFinished, StepFinished
from img2img_server.engine import step_loop
from img2img_server.engine.base import (
    DeviceLost,
    JobDone,
    JobFailed,
    JobStopped,
    PreviewReady,
    SampleReady,
)
from img2img_server.engine.denoiser import DeviceImage
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.imaging.base import Pixels
from tests.engine_bench import SECONDS, ReplyInbox, images, job, run, running
from tests.tiny_models import write_sd


@dataclass(eq=False)
class Held:
    """An image whose copy ends when it is released."""

    real: DeviceImage
    gone: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    @property
    def is_ready(self) -> bool:
        return self.gone.is_set()

    def pixels(self) -> Pixels:
        assert self.gone.wait(SECONDS)
        if self.error:
            raise self.error
        return self.real.pixels()

    def let_go(self, error: Exception | None = None) -> None:
        self.error = error
        self.gone.set()


class SlowReading(DiffusersDenoiser):
    """A denoiser whose images and previews are ready later, as on a GPU: when the test releases
    them.
    """

    def hold(self) -> None:
        self.held: queue.SimpleQueue[Held] = queue.SimpleQueue()

    def decode(self, latents: Tensor) -> Sequence[DeviceImage]:
        return [self._held(image) for image in super().decode(latents)]

    def preview(self, latents: Tensor) -> Sequence[DeviceImage]:
        return [self._held(image) for image in super().preview(latents)]

    def next(self) -> Held:
        return self.held.get(timeout=SECONDS)

    def _held(self, image: DeviceImage) -> Held:
        held = Held(image)
        self.held.put(held)
        return held


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> SlowReading:
    folder: Path = write_sd(tmp_path_factory.mktemp("sd"), tiny_vae=True)
    return SlowReading.load(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture
def denoiser(loaded: SlowReading) -> Iterator[SlowReading]:
    loaded.hold()
    yield loaded
    assert loaded.held.empty()


def test_the_steps_continue_while_an_image_is_on_its_way(denoiser: SlowReading) -> None:
    first, second = ReplyInbox(), ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(job(job_id=1), first)
        image = denoiser.next()
        engine.submit(job(job_id=2, strength=1.0, num_inference_steps=9), second)
        steps = second.until(StepFinished)
        while steps[-1].step < 9:  # All steps of the other job, up to its own image.
            steps += second.until(StepFinished)
        other = denoiser.next()
        events = first.until(StepFinished) + first.until(StepFinished)
        assert first.is_empty(), "its image is not there yet"
        for held in (image, other):
            held.let_go()
        ends = [inbox.all() for inbox in (first, second)]

    assert [type(event) for event in events] == [
        StageFinished,
        StageFinished,
        StepFinished,
        StepFinished,
    ]
    assert [[type(event) for event in end] for end in ends] == [[SampleReady, JobDone]] * 2


def test_what_a_job_tells_next_waits_for_its_preview(denoiser: SlowReading) -> None:
    inbox = ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(job(preview_interval_steps=1), inbox)
        preview, image = denoiser.next(), denoiser.next()  # Both steps are finished.
        events = inbox.until(StepFinished)
        assert inbox.is_empty()
        image.let_go()
        preview.let_go()
        events += inbox.all()

    kinds = [type(event) for event in events]
    assert kinds == [
        StageFinished,
        StageFinished,
        StepFinished,
        PreviewReady,
        StepFinished,
        SampleReady,
        JobDone,
    ]


def test_the_times_of_a_job_end_with_its_image(denoiser: SlowReading) -> None:
    inbox = ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(job(), inbox)
        image = denoiser.next()
        time.sleep(0.05)  # the time that the device still needs for the image
        image.let_go()
        done = inbox.all()[-1]

    assert isinstance(done, JobDone)
    assert 0.05 <= done.timings.decode <= done.timings.engine


def test_an_image_that_cannot_be_read_ends_its_job_and_no_other(denoiser: SlowReading) -> None:
    cause, first, second = RuntimeError("boom"), ReplyInbox(), ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(job(seeds=(1, 2)), first)
        one, two = denoiser.next(), denoiser.next()
        engine.submit(job(job_id=2), second)
        other = denoiser.next()
        one.let_go(cause)
        end = first.all()[-1]
        two.let_go()
        other.let_go()
        assert len(images(second.all())) == 1
        engine.submit(job(), first)  # The id of the job is free again.
        denoiser.next().let_go()
        assert len(images(first.all())) == 1

    assert isinstance(end, JobFailed)
    assert end.error is cause


def test_a_preview_that_cannot_be_read_costs_the_preview_only(denoiser: SlowReading) -> None:
    inbox = ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(job(preview_interval_steps=1), inbox)
        denoiser.next().let_go(RuntimeError("boom"))
        denoiser.next().let_go()
        events = inbox.all()

    assert len(images(events)) == 1
    assert not [event for event in events if isinstance(event, PreviewReady)]


def test_a_device_that_breaks_under_an_image_gives_back_all_other_jobs(
    denoiser: SlowReading, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ReplyInbox(), ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(job(), first)
        image = denoiser.next()
        engine.submit(job(job_id=2, strength=1.0, num_inference_steps=900), second)
        second.until(StepFinished)
        monkeypatch.setattr(step_loop, "device_works", lambda _: False)
        image.let_go(RuntimeError("CUDA error: an illegal memory access was encountered"))
        ends = [inbox.all()[-1] for inbox in (first, second)]
        (late,) = run(engine, job(job_id=3))

    assert [type(end) for end in (*ends, late)] == [DeviceLost, JobStopped, JobStopped]


@pytest.mark.parametrize(("error", "end"), [(None, JobDone), (RuntimeError("boom"), JobFailed)])
def test_a_job_whose_image_is_on_its_way_when_the_engine_stops_has_its_end(
    denoiser: SlowReading, error: Exception | None, end: type
) -> None:
    inbox = ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(job(), inbox)
        image = denoiser.next()
        stopping = threading.Thread(target=engine.stop)
        stopping.start()
        image.let_go(error)
        stopping.join()

    assert type(inbox.all()[-1]) is end
    assert inbox.is_empty()
