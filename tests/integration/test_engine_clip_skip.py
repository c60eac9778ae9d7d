"""clip_skip: the images are those of the stock pipelines, and of compel with long prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, ReturnedEmbeddingsType

from img2img_server.engine.base import Engine, EngineJob
from img2img_server.engine.model_spec import read_model_spec
from tests.engine_bench import (
    BOUND,
    ReplyInbox,
    Stock,
    blocks,
    difference,
    images,
    job,
    load,
    run,
    running,
    stock_call,
)
from tests.oracle.harness import models
from tests.tiny_models import write_sd, write_sdxl

LONG = "a boat on the sea and a house on the hill"
WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "sd": write_sd,
    "sdxl": write_sdxl,
    "sd3": models()["sd3.5"].write,
    "lcm": models()["lcm"].write,
}
# The text encoders of the small models have two layers.
MOST = {"sd": 2, "sdxl": 1, "sd3": 1, "lcm": 2}


def skipping_call(wanted: EngineJob, name: str) -> dict[str, Any]:
    call = {"sd3": models()["sd3.5"].call, "lcm": models()["lcm"].call}.get(name, stock_call)
    return {**call(wanted), "clip_skip": wanted.params.clip_skip or None}


@pytest.fixture(scope="module", params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[name](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with running(load(folder)) as opened:
        yield opened


def request_of(name: str, clip_skip: int, **changes: Any) -> EngineJob:
    scheduler = {"sd3": "flow_match_euler", "lcm": "lcm"}.get(name, "ddim")
    options: dict[str, Any] = {"negative_prompt": "fog", "guidance_scale": 7.0, "strength": 0.9}
    options |= {"init_image": blocks(64, 64)}
    options |= {"scheduler": scheduler, "clip_skip": clip_skip, "prompt": "a red boat"}
    return job(**{**options, **changes})


def test_an_image_without_the_last_layers_is_that_of_the_stock_pipeline(
    name: str, folder: Path, engine: Engine
) -> None:
    assert read_model_spec(str(folder)).info.max_clip_skip == MOST[name]
    stock = Stock(folder, lambda wanted: skipping_call(wanted, name))
    if not hasattr(encoder := stock._pipeline.text_encoder, "text_model"):
        # diffusers 0.42.1 looks for the last norm where transformers 4 had it.
        object.__setattr__(encoder, "text_model", encoder)
    (plain,) = images(run(engine, request_of(name, 0)))
    for clip_skip in range(1, MOST[name] + 1):
        wanted = request_of(name, clip_skip)
        (ours,) = images(run(engine, wanted))
        assert difference(ours, stock.images(wanted)[0]) <= BOUND
        assert difference(ours, plain) > BOUND


def test_requests_with_and_without_skipped_layers_share_batches(name: str, engine: Engine) -> None:
    wanted = [request_of(name, 1, job_id=1), request_of(name, 0, job_id=2)]
    alone = [images(run(engine, each))[0] for each in wanted]
    inboxes = [ReplyInbox() for _ in wanted]
    for each, inbox in zip(wanted, inboxes, strict=True):
        engine.submit(each, inbox)
    together = [images(inbox.all())[0] for inbox in inboxes]
    assert max(map(difference, alone, together)) <= BOUND


KINDS = {
    "sd": ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED,
    "sd usual": ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED,
}


def test_a_long_prompt_without_the_last_layer_gives_the_image_of_compel(tmp_path: Path) -> None:
    folder = write_sd(tmp_path)

    def call(wanted: EngineJob) -> dict[str, Any]:
        arguments = stock_call(wanted)
        found = {}
        for key, kind in (("prompt", "sd"), ("negative_prompt", "sd usual")):
            stock._pipeline.text_encoder.__dict__["text_model"] = stock._pipeline.text_encoder
            encoder = Compel(
                stock._pipeline.tokenizer,
                stock._pipeline.text_encoder,
                truncate_long_prompts=False,
                returned_embeddings_type=KINDS[kind],
            )
            found[f"{key}_embeds"] = encoder(arguments.pop(key))
        return {**arguments, **found}

    stock = Stock(folder, call)
    wanted = request_of("sd", 1, prompt=LONG, negative_prompt=LONG + " at night")
    with running(load(folder)) as engine, torch.inference_mode():
        (ours,) = images(run(engine, wanted))
        (plain,) = images(run(engine, request_of("sd", 0, prompt=LONG)))
        assert difference(ours, stock.images(wanted)[0]) <= BOUND
    assert difference(ours, plain) > BOUND
