"""A device that breaks for good: the engine says so once, and fails nobody for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from img2img_server.engine import step_loop
from img2img_server.engine.base import DeviceLost, JobStopped
from tests.engine_bench import Inbox, blocks, job, load, running
from tests.tiny_models import write_sd


def test_the_job_in_the_step_is_told_and_all_others_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load(write_sd(tmp_path, tiny_vae=True))

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(denoiser, "denoise", broken)
    monkeypatch.setattr(step_loop, "device_works", lambda _: False)
    with running(denoiser) as engine:
        inboxes = {job_id: Inbox() for job_id in (1, 2, 3)}
        engine.submit(job(job_id=1, init_image=blocks(64, 64)), inboxes[1])
        engine.submit(job(job_id=2, init_image=blocks(64, 72)), inboxes[2])
        ends = {job_id: inboxes[job_id].all()[-1] for job_id in (1, 2)}
        engine.submit(job(job_id=3, init_image=blocks(64, 64)), inboxes[3])
        ends[3] = inboxes[3].all()[-1]
    kinds = {job_id: type(end) for job_id, end in ends.items()}
    assert kinds == {1: DeviceLost, 2: JobStopped, 3: JobStopped}
