"""Networks whose inputs depend on the length of the prompt are compiled once for all lengths."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from img2img_server.engine.base import EngineJob
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import families as served
from img2img_server.engine.family import ModelError
from img2img_server.engine.options import Compile, ModelOptions
from img2img_server.imaging.base import Pixels
from tests.engine_bench import BOUND, ReplyInbox, blocks, difference, images, job, running
from tests.oracle.harness import families

FAMILIES = [family for family in served() if family.lengths_vary]


def load(folder: Path, how: Compile) -> DiffusersDenoiser:
    options = ModelOptions(compile=how)
    cpu, dtype = torch.device("cpu"), torch.float32
    return DiffusersDenoiser.load(str(folder), cpu, dtype, options, max_batch_size=4)


def run_together(denoiser: DiffusersDenoiser, wanted: list[EngineJob]) -> list[Pixels]:
    with running(denoiser, max_batch_size=4) as engine:
        inboxes = [ReplyInbox() for _ in wanted]
        for each, inbox in zip(wanted, inboxes, strict=True):
            engine.submit(each, inbox)
        return [image for inbox in inboxes for image in images(inbox.all())]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_length_of_a_prompt_is_compiled_after_the_warm_up(
    family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    # The real compiler would take minutes. The test counts its calls.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = next(iter(families()[family.name].values()))
    folder, size = model.write(tmp_path), model.sizes[0]
    wanted = [
        job(
            job_id=place,
            prompt="a" * (1 + 40 * place),
            scheduler=family.default_scheduler,
            guidance_scale=scale,
            seeds=seeds,
            init_image=blocks(*size),
            num_inference_steps=3,
        )
        for place, (scale, seeds) in enumerate(
            [(model.guidance_scales[0], (1,)), (model.guidance_scales[-1], (2, 3))]
        )
    ]
    denoiser = load(folder, Compile.REGIONAL)
    graphs.clear()
    with running(denoiser, max_batch_size=4) as engine:
        engine.warm_up(*size)
    compiled = len(graphs)
    found = [*run_together(denoiser, wanted[:1]), *run_together(denoiser, wanted)]

    assert len(graphs) == compiled > 0
    plain = load(folder, Compile.OFF)
    expected = [*run_together(plain, wanted[:1]), *run_together(plain, wanted)]
    assert max(map(difference, found, expected)) <= BOUND


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_compiling_such_a_network_as_a_whole_is_refused(family: Any, tmp_path: Path) -> None:
    folder = next(iter(families()[family.name].values())).write(tmp_path)
    with pytest.raises(ModelError, match="the setting must be regional or off") as caught:
        load(folder, Compile.WHOLE)

    assert caught.value.setting == "compile"
