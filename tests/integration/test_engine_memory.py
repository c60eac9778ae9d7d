"""The engine's memory over many jobs."""

from __future__ import annotations

from pathlib import Path

import psutil

from img2img_server.engine.base import Engine, JobDone
from img2img_server.engine.denoiser import TextInput
from img2img_server.engine.diffusers.samplers import DIFFUSION_SAMPLERS
from tests.engine_bench import ReplyInbox, blocks, job, load, running
from tests.tiny_models import write_sd

WARM_UP_JOBS, JOBS, WAVE = 144, 160, 16


def run_wave(engine: Engine, first_id: int) -> None:
    """Runs jobs of two sizes with all samplers and different prompts, and cancels some of them."""
    inboxes = []
    for job_id in range(first_id, first_id + WAVE):
        inboxes.append(ReplyInbox())
        wanted = job(
            job_id=job_id,
            prompt=f"prompt {job_id}",
            init_image=blocks(64, 72 if job_id % 3 else 64),
            scheduler=DIFFUSION_SAMPLERS[job_id % len(DIFFUSION_SAMPLERS)],
            guidance_scale=4.0 if job_id % 2 else 1.0,
            preview_interval_steps=1,
            num_inference_steps=2,
            strength=1.0 if job_id % 4 == 0 else 0.5,
        )
        engine.submit(wanted, inboxes[-1])
    engine.cancel(first_id + 5)
    ends = [type(inbox.all()[-1]) for inbox in inboxes]
    assert ends.count(JobDone) >= WAVE - 1


def test_memory_does_not_grow_with_the_number_of_jobs(tmp_path: Path) -> None:
    process = psutil.Process()
    with running(load(write_sd(tmp_path, tiny_vae=True))) as engine:
        for first_id in range(0, WARM_UP_JOBS, WAVE):
            # This wave fills the caches of prompts and schedules.
            run_wave(engine, first_id)
        before = process.memory_info().rss
        for first_id in range(WARM_UP_JOBS, WARM_UP_JOBS + JOBS, WAVE):
            run_wave(engine, first_id)
        grown = process.memory_info().rss - before

    assert grown < 20 * 2**20, f"{grown / 2**20:.1f} MiB over {JOBS} jobs"


def test_the_cache_of_prompts_is_bounded(tmp_path: Path) -> None:
    denoiser = load(write_sd(tmp_path, tiny_vae=True))
    for first in range(0, 200, 50):
        texts = [
            TextInput(
                prompt=f"p {number}", negative_prompt="", guidance_scale=1.0, height=64, width=64
            )
            for number in range(first, first + 50)
        ]
        denoiser.encode_texts(texts)

    assert len(denoiser._text._cache) == 128
