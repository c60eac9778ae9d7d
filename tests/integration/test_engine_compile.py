"""Announced sizes are compiled before the worker is ready, and no shape is compiled later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from img2img_server.engine.base import JobDone
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions
from img2img_server.settings import Settings
from tests.engine_bench import blocks, job, run
from tests.tiny_models import write_sd

SIZES = ((64, 64), (64, 72))


def test_every_announced_shape_is_compiled_before_the_first_job_and_none_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, limits = list[int](), set[int]()

    # This function replaces the compiler, which would take minutes. The test counts its calls.
    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        limits.add(torch._dynamo.config.recompile_limit)  # the limit of this thread
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(compile_module, backend=counting)
    )
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    torch.compiler.reset()
    announced = ", ".join(f"{width}x{height}" for height, width in SIZES)
    settings = Settings(
        model=str(write_sd(tmp_path / "sd")),
        compile="whole",
        warm_up_sizes=announced,
        max_batch_size=2,
    )
    engine = load_engine(EngineOptions.of(settings))
    try:
        before = len(compiled)
        for number, (height, width) in enumerate(SIZES):
            image = blocks(height, width)
            prompt = "a boat on the sea and a house on the hill" if number % 2 else "a boat"
            wanted = job(
                job_id=number,
                prompt=prompt,
                init_image=image,
                guidance_scale=4.0,
                seeds=(1, 2, 3),
            )
            assert isinstance(run(engine, wanted)[-1], JobDone)
    finally:
        engine.stop()
        torch.compiler.reset()

    assert len(compiled) == before
    networks = [nodes for nodes in compiled if nodes > 99]
    assert len(networks) == len(SIZES) * 2 * 2, (
        "batches of 1 and 2 forwards, short and long prompts"
    )
    assert max(limits) > 1000, "what comes after the limit runs as slowly as if not compiled"
