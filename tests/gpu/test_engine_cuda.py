"""Tests on a GPU: no waits inside a step, captured graphs, measured peaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from img2img_server.domain.job import Determinism
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.host_copy import HostCopy
from img2img_server.engine.load import load_engine
from img2img_server.engine.memory import CudaProbe, MemoryModel
from img2img_server.engine.options import EngineOptions, ModelOptions
from img2img_server.settings import Settings
from tests.engine_bench import BOUND, ReplyInbox, difference, images, job, run, running
from tests.tiny_models import write_sd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 6, "strength": 0.9}
WANTED = job(seeds=(1, 2), **OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


class NoWaits(DiffusersDenoiser):
    """Fails if a call waits for the device, except the first call of a kind, which builds
    kernels.
    """

    def count(self) -> None:
        self.calls: Counter[str] = Counter()

    def denoise(self, *arguments: Any) -> torch.Tensor:
        with self._no_waits("denoise"):
            return super().denoise(*arguments)

    def preview(self, latents: torch.Tensor) -> Sequence[HostCopy]:
        with self._no_waits("preview"):
            return super().preview(latents)

    def decode(self, latents: torch.Tensor) -> Sequence[HostCopy]:
        with self._no_waits("decode"):
            return super().decode(latents)

    @contextmanager
    def _no_waits(self, kind: str) -> Iterator[None]:
        self.calls[kind] += 1
        torch.cuda.set_sync_debug_mode("error" if self.calls[kind] > 1 else "default")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_neither_a_step_nor_an_image_waits_for_the_device(folder: Path) -> None:
    denoiser = NoWaits.load(str(folder), torch.device("cuda"), torch.float32, ModelOptions())
    denoiser.count()
    with running(denoiser) as engine:
        for job_id in (1, 2):
            wanted = job(job_id=job_id, seeds=(1, 2), preview_interval_steps=1, **OPTIONS)
            assert len(images(run(engine, wanted))) == 2
    assert min(denoiser.calls[kind] for kind in ("denoise", "preview", "decode")) > 1


def test_captured_graphs_draw_the_same_images(folder: Path) -> None:
    found = {}
    for how in ("off", "whole"):
        settings = Settings(
            model=str(folder), dtype="float32", compile=how, warm_up_sizes="72x64", max_batch_size=4
        )
        engine = load_engine(EngineOptions.of(settings))
        try:
            found[how] = images(run(engine, WANTED))
        finally:
            engine.stop()

    pairs = zip(found["off"], found["whole"], strict=True)
    assert max(difference(one, other) for one, other in pairs) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strangers_in_the_batch_change_an_image_by_little(folder: Path, dtype: torch.dtype) -> None:
    denoiser = DiffusersDenoiser.load(str(folder), torch.device("cuda"), dtype)
    assert denoiser.determinism is Determinism.CLOSE
    with running(denoiser) as engine:
        alone = images(run(engine, WANTED))
        strangers = [job(job_id=n, seeds=(n,), prompt="fog", **OPTIONS) for n in range(2, 6)]
        inboxes = [ReplyInbox() for _ in strangers]
        for stranger, inbox in zip(strangers, inboxes, strict=True):
            engine.submit(stranger, inbox)
        packed = images(run(engine, replace(WANTED, job_id=9)))
        for inbox in inboxes:
            inbox.all()

    apart = max(difference(one, other) for one, other in zip(alone, packed, strict=True))
    print(f"{dtype}: at most {apart} of 255 levels apart")
    assert apart <= (BOUND if dtype is torch.float32 else 8 * BOUND)


def test_peaks_are_measured(folder: Path) -> None:
    device = torch.device("cuda")
    memory = MemoryModel(CudaProbe(device))
    denoiser = DiffusersDenoiser.load(str(folder), device, torch.float32)
    with running(denoiser, memory=memory) as engine:
        assert len(images(run(engine, WANTED))) == 2

    need = memory.need(64, 72, 4)
    assert need is not None
    assert need > 0
    assert memory.shortfall(64, 72, 4) is None
