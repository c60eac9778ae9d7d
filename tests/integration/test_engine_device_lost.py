"""A device that breaks permanently: the engine reports it once and does not fail the other jobs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from img2img_server.domain.params import Lora
from img2img_server.engine import step_loop
from img2img_server.engine.base import (
    DeviceLost,
    EngineEvent,
    JobDone,
    JobFailed,
    JobState,
    JobStopped,
    JobSuspended,
)
from img2img_server.engine.memory import MemoryModel, NoProbe
from tests.engine_bench import ReplyInbox, blocks, job, load, run, running
from tests.tiny_models import write_sd


class Breaking(NoProbe):
    """A memory probe that raises errors once the device is broken."""

    is_broken = False

    @property
    def free(self) -> int | None:
        if self.is_broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return None


def test_the_job_in_the_step_is_reported_and_all_others_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load(write_sd(tmp_path, tiny_vae=True))

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(denoiser, "denoise", broken)
    monkeypatch.setattr(step_loop, "device_works", lambda _: False)
    with running(denoiser) as engine:
        inboxes = {job_id: ReplyInbox() for job_id in (1, 2, 3)}
        engine.submit(job(job_id=1, init_image=blocks(64, 64)), inboxes[1])
        engine.submit(job(job_id=2, init_image=blocks(64, 72)), inboxes[2])
        ends = {job_id: inboxes[job_id].all()[-1] for job_id in (1, 2)}
        engine.submit(job(job_id=3, init_image=blocks(64, 64)), inboxes[3])
        ends[3] = inboxes[3].all()[-1]
    kinds = {job_id: type(end) for job_id, end in ends.items()}
    assert kinds == {1: DeviceLost, 2: JobStopped, 3: JobStopped}


def test_jobs_that_have_not_continued_keep_their_states_when_the_device_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load(write_sd(tmp_path, tiny_vae=True))
    waiting, late, first = ReplyInbox(), ReplyInbox(), ReplyInbox()
    state = JobState(state_key="", job_id=2, tenant="", steps={0: 1}, total=2, tensors=b"")
    resumed = replace(job(job_id=2, init_image=blocks(64, 72)), state=state)

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(denoiser, "denoise", broken)
    monkeypatch.setattr(step_loop, "device_works", lambda _: False)
    with running(denoiser) as engine:
        engine.submit(job(job_id=1, init_image=blocks(64, 64)), first)
        engine.submit(resumed, waiting)
        ends = [first.all()[-1], waiting.all()[-1]]
        engine.submit(resumed, late)
        ends += late.all()
    assert [type(end) for end in ends] == [DeviceLost, JobSuspended, JobSuspended]
    assert [end.state for end in ends if isinstance(end, JobSuspended)] == [state, state]


def test_a_device_that_broke_while_idle_fails_no_job_that_comes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Breaking()
    with running(load(write_sd(tmp_path, tiny_vae=True)), memory=MemoryModel(meter)) as engine:
        ends = [run(engine, job(job_id=1))[-1]]
        meter.is_broken = True
        monkeypatch.setattr(step_loop, "device_works", lambda _: False)
        ends += [run(engine, job(job_id=job_id))[-1] for job_id in (2, 3)]
    assert [type(end) for end in ends] == [JobDone, DeviceLost, JobStopped]


def test_a_device_found_broken_by_a_new_job_gives_back_the_running_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, first, second = Breaking(), ReplyInbox(), ReplyInbox()
    monkeypatch.setattr(step_loop, "device_works", lambda _: False)
    with running(load(write_sd(tmp_path, tiny_vae=True)), memory=MemoryModel(meter)) as engine:

        def break_when_it_runs(event: EngineEvent) -> None:
            if not meter.is_broken:
                meter.is_broken = True
                engine.submit(job(job_id=2), second)
            first(event)

        engine.submit(job(job_id=1), break_when_it_runs)
        ends = [inbox.all()[-1] for inbox in (first, second)]
    assert [type(end) for end in ends] == [JobStopped, DeviceLost]


def test_a_job_that_cannot_begin_on_a_device_that_works_fails_alone(tmp_path: Path) -> None:
    meter = Breaking()
    with running(load(write_sd(tmp_path, tiny_vae=True)), memory=MemoryModel(meter)) as engine:
        meter.is_broken = True
        ends = [run(engine, job(job_id=1))[-1]]
        meter.is_broken = False
        ends += [run(engine, job(job_id=2))[-1]]
    assert [type(end) for end in ends] == [JobFailed, JobDone]


def test_a_refused_job_does_not_ask_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_loop, "device_works", lambda _: False)
    with running(load(write_sd(tmp_path, tiny_vae=True))) as engine:
        ends = [
            run(engine, job(job_id=1, loras=(Lora("none"),)))[-1],
            run(engine, job(job_id=2))[-1],
        ]
    assert [type(end) for end in ends] == [JobFailed, JobDone]


def test_a_cache_that_cannot_be_cleared_harms_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load(write_sd(tmp_path, tiny_vae=True))

    def broken() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(denoiser, "clear_cache", broken)
    with running(denoiser) as engine:
        engine.clear_cache()
        assert isinstance(run(engine, job())[-1], JobDone)
