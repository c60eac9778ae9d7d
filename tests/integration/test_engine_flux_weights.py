"""Weighted prompts of FLUX.1: the images are those of compel with the stock pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compel import CompelForFlux

from img2img_server.engine.base import Engine, EngineJob, JobDone
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
)
from tests.oracle.harness import models
from tests.tiny_flow import sized_call

MODEL = models()["flux dev with true_cfg_scale"]
# Each prompt in the syntax of the service, and in that of compel.
WEIGHTED = {
    "up": ("a (red:1.5) boat", "a (red)1.5 boat"),
    "down": ("a (red:0.4) boat", "a (red)0.4 boat"),
    "two": ("(red:1.4) (boat:0.2)", "(red)1.4 (boat)0.2"),
    "none": ("a (red:0) boat", "a (red)0 boat"),
    "brackets": ("a [red boat]", f"a (red boat){1 / 1.1}"),
    "cut": ("a boat on the sea (and a house:1.4)", "a boat on the sea (and a house)1.4"),
}


class CompelStock(Stock):
    """The stock pipeline with the embeddings of compel."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, self._arguments)
        self._compel = CompelForFlux(self._pipeline)

    def _arguments(self, wanted: EngineJob) -> dict[str, Any]:
        arguments = sized_call(wanted)
        found = self._compel(
            [arguments.pop("prompt")], negative_prompt=arguments.pop("negative_prompt")
        )
        given = {
            "prompt_embeds": found.embeds,
            "pooled_prompt_embeds": found.pooled_embeds,
            "negative_prompt_embeds": found.negative_embeds,
            "negative_pooled_prompt_embeds": found.negative_pooled_embeds,
            "true_cfg_scale": wanted.params.true_cfg_scale or 1.0,
        }
        return {**arguments, **given}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODEL.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stock(folder: Path) -> CompelStock:
    return CompelStock(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with running(load(folder)) as opened:
        yield opened


def request_of(prompt: str, **changes: Any) -> EngineJob:
    options: dict[str, Any] = {"guidance_scale": 3.5, "strength": 0.9, "num_inference_steps": 2}
    options |= {"scheduler": "flow_match_euler", "init_image": blocks(64, 80)}
    return job(prompt=prompt, **{**options, **changes})


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights_change_the_image_as_compel_does(
    stock: CompelStock, engine: Engine, kind: str
) -> None:
    prompt, of_compel = WEIGHTED[kind]
    (ours,) = images(run(engine, request_of(prompt, prompt_weights=True)))
    (theirs,) = stock.images(request_of(of_compel))
    assert difference(ours, theirs) <= BOUND
    (text,) = images(run(engine, request_of(prompt)))
    assert difference(ours, text) > BOUND


def test_the_negative_prompt_has_weights_too(stock: CompelStock, engine: Engine) -> None:
    options: dict[str, Any] = {"true_cfg_scale": 2.5}
    weighted = request_of("a boat", negative_prompt="(fog:1.6)", prompt_weights=True, **options)
    (ours,) = images(run(engine, weighted))
    (theirs,) = stock.images(request_of("a boat", negative_prompt="(fog)1.6", **options))
    assert difference(ours, theirs) <= BOUND


def test_a_weighted_request_shares_batches_with_others(engine: Engine) -> None:
    wanted = [
        request_of(prompt, job_id=number, prompt_weights=True)
        for number, prompt in enumerate(("a (red:1.5) boat", "a boat"), 1)
    ]
    alone = [images(run(engine, each))[0] for each in wanted]
    inboxes = [ReplyInbox() for _ in wanted]
    for each, inbox in zip(wanted, inboxes, strict=True):
        engine.submit(each, inbox)
    together = [images(inbox.all())[0] for inbox in inboxes]
    assert max(map(difference, alone, together)) <= BOUND


def test_a_break_is_read_as_a_space_and_announced(engine: Engine) -> None:
    weighted = run(engine, request_of("a (boat:1.2) BREAK sea", prompt_weights=True))
    joined = run(engine, request_of("a (boat:1.2) sea", prompt_weights=True))
    assert difference(images(weighted)[0], images(joined)[0]) <= BOUND
    done = weighted[-1]
    assert isinstance(done, JobDone)
    warning = "BREAK in the prompt has no effect: the model reads it as one chunk."
    assert warning in done.warnings


def test_the_model_announces_that_it_takes_weights(folder: Path) -> None:
    assert read_model_spec(str(folder)).info.takes_prompt_weights
