"""The contract between engines and the worker. Runs against each implementation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from img2img_server.domain.events import Stage, StageFinished, StepFinished
from img2img_server.engine.base import (
    RESTARTED_WARNING,
    Engine,
    EngineEvent,
    EngineJob,
    JobDone,
    JobStopped,
    JobSuspended,
    PreviewReady,
    SampleReady,
)
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.fingerprint import fingerprint, sums
from img2img_server.engine.options import ModelOptions
from img2img_server.errors import EngineError
from img2img_server.testing.fake_engine import FakeEngine
from tests.engine_bench import BOUND, ReplyInbox, difference, images, job, load, run, running
from tests.tiny_models import write_sd


@contextmanager
def fake() -> Iterator[Engine]:
    engine = FakeEngine(step_seconds=0.002)
    try:
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> DiffusersDenoiser:
    return load(write_sd(tmp_path_factory.mktemp("sd")))


@pytest.fixture(params=["fake", "real"])
def engine(request: pytest.FixtureRequest, denoiser: DiffusersDenoiser) -> Iterator[Engine]:
    with fake() if request.param == "fake" else running(denoiser) as opened:
        yield opened


def test_a_job_reports_its_stages_its_steps_its_image_and_its_end_in_this_order(
    engine: Engine,
) -> None:
    events = run(engine, job())

    kinds = [type(event) for event in events]
    assert kinds == [StageFinished, StageFinished, StepFinished, StepFinished, SampleReady, JobDone]
    assert events[:2] == [
        StageFinished(stage=Stage.TEXT_ENCODED),
        StageFinished(stage=Stage.IMAGE_ENCODED),
    ]
    steps = [event for event in events if isinstance(event, StepFinished)]
    assert [(step.sample, step.step, step.total) for step in steps] == [(0, 1, 2), (0, 2, 2)]
    assert steps[0].sigma > steps[1].sigma == 0.0


def test_the_image_has_the_size_of_the_init_image(engine: Engine) -> None:
    (pixels,) = images(run(engine, job()))

    assert (pixels.shape, pixels.dtype) == ((64, 72, 3), np.uint8)


def test_timings_count_the_steps_of_all_samples_and_lie_within_the_whole(engine: Engine) -> None:
    done = run(engine, job(seeds=(1, 2, 3), strength=1.0))[-1]

    assert isinstance(done, JobDone)
    timings = done.timings
    assert timings.steps == 12
    assert 0.0 < timings.batch_share <= 1.0
    assert 0.0 < timings.encode + timings.denoise + timings.decode <= timings.engine * 1.001
    assert 0.0 < done.device_seconds <= timings.engine * 1.001


def test_jobs_that_share_batches_share_the_device_seconds(denoiser: DiffusersDenoiser) -> None:
    inboxes = [ReplyInbox() for _ in range(4)]
    with running(denoiser) as engine:
        began = time.monotonic()
        for number, inbox in enumerate(inboxes, start=1):
            engine.submit(job(job_id=number, seeds=(number, number + 1)), inbox)
        done = [inbox.all()[-1] for inbox in inboxes]
        took = time.monotonic() - began
    seconds = [each.device_seconds for each in done if isinstance(each, JobDone)]
    assert len(seconds) == 4
    assert min(seconds) > 0.0
    assert sum(seconds) <= took * 1.001


def test_the_same_seed_gives_the_same_image_and_another_seed_another_one(engine: Engine) -> None:
    first = images(run(engine, job(seeds=(5, 6))))
    again = images(run(engine, job(job_id=2, seeds=(6,))))

    assert difference(first[1], again[0]) <= BOUND
    assert difference(first[0], first[1]) > BOUND


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_stored_samples_are_not_generated_and_the_others_are_the_same(
    engine: Engine, strength: float
) -> None:
    whole = job(seeds=(5, 6, 7, 8), strength=strength)
    every = {event.sample: event.pixels for event in ready(run(engine, whole))}
    rest = run(engine, replace(whole, stored=frozenset({0, 2})))

    assert {event.sample for event in ready(rest)} == {1, 3}
    assert all(difference(event.pixels, every[event.sample]) <= BOUND for event in ready(rest))
    assert {event.sample for event in rest if isinstance(event, StepFinished)} <= {1, 3}
    done = rest[-1]
    assert isinstance(done, JobDone)
    assert done.timings.steps == 2 * done.denoising_steps


def ready(events: list[EngineEvent]) -> list[SampleReady]:
    return [event for event in events if isinstance(event, SampleReady)]


def test_strength_zero_gives_the_init_image_without_a_stage_or_a_step(engine: Engine) -> None:
    wanted = job(strength=0.0)
    events = run(engine, wanted)

    assert [type(event) for event in events] == [SampleReady, JobDone]
    assert np.array_equal(images(events)[0], wanted.init_image)


def test_previews_come_at_the_asked_interval_and_are_small(engine: Engine) -> None:
    events = run(engine, job(num_inference_steps=6, strength=1.0, preview_interval_steps=2))

    previews = [event for event in events if isinstance(event, PreviewReady)]
    assert [preview.step for preview in previews] == [2, 4]
    assert all(max(preview.pixels.shape) <= 256 for preview in previews)
    assert all(preview.pixels.shape[2] == 3 for preview in previews)


def test_a_cancelled_job_ends_stopped_and_says_nothing_after_it(engine: Engine) -> None:
    inbox = ReplyInbox()

    def sink(event: EngineEvent) -> None:
        inbox(event)
        if isinstance(event, StepFinished):
            engine.cancel(1)

    engine.submit(job(num_inference_steps=40, strength=1.0), sink)

    kinds = [type(event) for event in inbox.all()]
    assert kinds == [StageFinished, StageFinished, StepFinished, JobStopped]
    assert [type(event) for event in run(engine, job(job_id=2))][-1] is JobDone
    assert inbox.is_empty()


def test_cancelling_an_unknown_job_does_nothing(engine: Engine) -> None:
    engine.cancel(99)

    assert isinstance(run(engine, job())[-1], JobDone)


def test_jobs_submitted_together_all_end(engine: Engine) -> None:
    inboxes = [ReplyInbox() for _ in range(12)]
    for index, inbox in enumerate(inboxes):
        engine.submit(job(job_id=index, seeds=(index, index + 1)), inbox)

    assert [type(inbox.all()[-1]) for inbox in inboxes] == [JobDone] * 12


def test_a_sink_that_raises_harms_no_other_job(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: EngineEvent) -> None:
        raise ValueError(event)

    engine.submit(job(), broken)

    assert isinstance(run(engine, job(job_id=2))[-1], JobDone)
    assert "event_sink_failed: job 1" in caplog.text


def test_a_stopped_engine_ends_its_jobs_and_refuses_new_ones(engine: Engine) -> None:
    inbox = ReplyInbox()
    engine.submit(job(num_inference_steps=900, strength=1.0), inbox)
    inbox.until(StepFinished)
    engine.stop()

    assert isinstance(inbox.all()[-1], JobStopped)
    with pytest.raises(EngineError):
        engine.submit(job(job_id=2), inbox)


def test_it_says_what_it_is(engine: Engine) -> None:
    assert engine.model.name
    assert engine.model.schedulers
    assert engine.device
    assert engine.max_batch_size >= 1


def test_a_cleared_cache_changes_no_image(engine: Engine) -> None:
    before = images(run(engine, job()))
    engine.clear_cache()

    assert difference(images(run(engine, job(job_id=2)))[0], before[0]) == 0


def test_the_time_its_device_worked_grows_with_its_jobs_and_not_while_it_rests(
    engine: Engine,
) -> None:
    assert isinstance(run(engine, job())[-1], JobDone)
    assert isinstance(run(engine, job(job_id=2))[-1], JobDone)
    once = engine.busy_seconds
    assert once > 0.0

    assert isinstance(run(engine, job(job_id=3))[-1], JobDone)
    assert engine.busy_seconds >= once


def test_clearing_the_cache_of_a_model_forgets_its_prompts(denoiser: DiffusersDenoiser) -> None:
    with running(denoiser) as engine:
        run(engine, job())
        assert denoiser._text._cache
        engine.clear_cache()
        engine.stop()
    assert not denoiser._text._cache


def suspended_after(engine: Engine, one: EngineJob, step: int) -> list[EngineEvent]:
    """Runs a job until its last sample has taken this step, then suspends it."""
    inbox, last = ReplyInbox(), one.indices[-1]

    def sink(event: EngineEvent) -> None:
        if isinstance(event, StepFinished) and (event.sample, event.step) == (last, step):
            engine.suspend(one.job_id)
        inbox(event)

    engine.submit(one, sink)
    return inbox.all()


def test_a_suspended_job_continues_with_its_next_step_and_the_same_image(engine: Engine) -> None:
    one = job(strength=1.0, num_inference_steps=8, seeds=(1, 2))
    expected = images(run(engine, one))
    before = suspended_after(engine, one, 3)
    suspended = before[-1]
    assert isinstance(suspended, JobSuspended)
    assert suspended.state.steps == {0: 3, 1: 3}
    assert 0.0 < suspended.state.device_seconds <= suspended.engine_seconds * 1.001

    after = run(engine, replace(one, state=suspended.state))
    done = after[-1]

    steps = [event for event in (*before, *after) if isinstance(event, StepFinished)]
    assert sorted((step.sample, step.step) for step in steps) == [
        (sample, step) for sample in (0, 1) for step in range(1, 9)
    ]
    assert isinstance(done, JobDone)
    assert (done.timings.steps, done.denoising_steps, done.warnings) == (16, 8, ())
    assert done.device_seconds > suspended.state.device_seconds
    # Two samples share batches, or not; alone, the image is equal (tests/oracle/test_suspended.py).
    assert max(map(difference, images(after), expected)) <= BOUND


def test_a_job_that_is_suspended_again_before_its_next_step_keeps_its_state(
    engine: Engine,
) -> None:
    one = job(strength=1.0, num_inference_steps=8)
    expected = images(run(engine, one))
    first = suspended_after(engine, one, 3)[-1]
    assert isinstance(first, JobSuspended)
    unusable = replace(first.state, state_key="another")
    states = (first.state, unusable, None)
    inboxes, other = [ReplyInbox() for _ in states], ReplyInbox()

    def sink(event: EngineEvent) -> None:
        if isinstance(event, StepFinished) and event.step == 1:  # No other step begins meanwhile.
            for number, (state, inbox) in enumerate(zip(states, inboxes, strict=True), one.job_id):
                engine.submit(replace(one, job_id=number, state=state), inbox)
                engine.suspend(number)
        other(event)

    engine.submit(job(job_id=99, strength=1.0), sink)
    assert isinstance(other.all()[-1], JobDone)
    ends = [inbox.all() for inbox in inboxes]

    # The next engine continues from the state, or starts the job again with a warning.
    for (end,), state in zip(ends[:2], states, strict=False):
        assert isinstance(end, JobSuspended)
        assert (end.state, end.spans, end.engine_seconds) == (state, (), 0.0)
    assert [type(event) for event in ends[2]] == [JobStopped]
    assert np.array_equal(images(run(engine, replace(one, state=first.state)))[0], expected[0])


def test_a_job_without_a_step_or_with_all_steps_is_not_suspended(engine: Engine) -> None:
    engine.suspend(99)  # an unknown job
    assert isinstance(suspended_after(engine, job(strength=1.0), 4)[-1], JobDone)


def test_a_state_that_cannot_be_used_starts_the_job_again_with_a_warning(
    denoiser: DiffusersDenoiser,
) -> None:
    one = job(strength=1.0, num_inference_steps=8)
    with running(denoiser) as engine:
        expected = images(run(engine, one))
        suspended = suspended_after(engine, one, 3)[-1]
        assert isinstance(suspended, JobSuspended)
        good = suspended.state
        unusable = [
            replace(good, state_key="another model"),
            replace(good, job_id=2),
            replace(good, tenant="another tenant"),
            replace(good, total=9),
            replace(good, steps={0: 8}),
            replace(good, steps={1: 3}),
            replace(good, tensors=good.tensors[: len(good.tensors) // 2]),
            replace(good, tensors=b""),
            replace(good, tensors=save({"0.generator": torch.zeros(4, dtype=torch.uint8)})),
            replace(good, tensors=save({"0.slot.0": torch.zeros(1, 4, 8)})),
        ]
        for state in unusable:
            events = run(engine, replace(one, state=state))
            assert isinstance(events[-1], JobDone)
            assert events[-1].warnings == (RESTARTED_WARNING,)
            assert events[-1].timings.steps == 8
            assert np.array_equal(images(events)[0], expected[0])


def test_the_state_key_tells_models_and_options_apart(
    denoiser: DiffusersDenoiser, tmp_path: Path
) -> None:
    same = load(write_sd(tmp_path / "same"))
    assert same.state_key == denoiser.state_key
    weight = same._model.network.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1e-3
    assert same._key(ModelOptions()) != denoiser.state_key
    folder = tmp_path / "same"
    cpu = torch.device("cpu")
    half = DiffusersDenoiser.load(str(folder), cpu, torch.bfloat16)
    fused = DiffusersDenoiser.load(str(folder), cpu, torch.float32, ModelOptions(fuse_qkv=True))
    assert len({denoiser.state_key, half.state_key, fused.state_key}) == 3


def test_a_fingerprint_depends_on_every_value_and_its_place() -> None:
    def hashed(numbers: torch.Tensor, part: str = "part") -> str:
        layer = torch.nn.Module()
        layer.register_buffer("numbers", numbers)
        return fingerprint({part: layer})

    numbers = torch.arange(100.0)
    found = {hashed(numbers), hashed(numbers, "another"), hashed(numbers.half())}
    found |= {hashed(other) for other in changed(numbers)}
    assert len(found) == 7
    assert hashed(numbers) == hashed(numbers.clone())


def test_the_sums_of_a_large_tensor_depend_on_every_value_and_its_place() -> None:
    numbers = torch.arange(2**15 + 99, dtype=torch.float32)
    found = {
        b"".join(part.numpy().tobytes() for part in sums(each.view(torch.uint8)))
        for each in (numbers, *changed(numbers))
    }
    assert len(found) == 5


def changed(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Returns copies: with another value at three places, and with two values exchanged."""
    copies = [numbers.clone() for _ in range(4)]
    for copy, place in zip(copies, (0, len(numbers) // 2, -1), strict=False):
        copy[place] += 1
    copies[3][:2] = numbers[:2].flip(0)
    return copies
