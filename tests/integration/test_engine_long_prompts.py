"""Prompts that are longer than the window of a CLIP encoder: the images are those of compel with
the stock pipeline, and rows with different numbers of chunks share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import CompelForSD, CompelForSDXL
from torch import Tensor

from img2img_server.domain.prompt_syntax import parse, plain_text
from img2img_server.engine.base import Engine, EngineJob, JobDone
from img2img_server.engine.denoiser import Conditioning, TextInput
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.windows import max_chunks, pad_chunks
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import Compile, EngineOptions, ModelOptions
from img2img_server.settings import Settings
from tests.engine_bench import (
    BOUND,
    ReplyInbox,
    Stock,
    blocks,
    difference,
    images,
    job,
    run,
    running,
    stock_call,
)
from tests.tiny_models import LENGTH, write_sd, write_sdxl

# The tokenizers of the small models know single letters only, and read 14 of them in a window.
SHORT = "a boat"
LONG = "a boat on the sea and a house on the hill"
LONGER = LONG + " with a garden and a wall and a long road to the town"
WRITERS: Mapping[str, Callable[[Path], Path]] = {"sd": write_sd, "sdxl": write_sdxl}


class Counting(DiffusersDenoiser):
    """The real denoiser, which records the numbers of tokens in each batch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.batches: list[set[int]] = []

    def denoise(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        conditionings: Sequence[Conditioning],
    ) -> Sequence[Tensor]:
        self.batches.append({len(row.prompt.tensors["tokens"]) for row in conditionings})
        return super().denoise(latents, timesteps, conditionings)


class CompelStock(Stock):
    """The stock pipeline with the embeddings of compel."""

    def __init__(self, folder: Path, name: str, pooled_prompt: str = "") -> None:
        super().__init__(folder, self._arguments)
        self._pooled_prompt = pooled_prompt
        self._compel: Any = {"sd": CompelForSD, "sdxl": CompelForSDXL}[name](self._pipeline)

    def _arguments(self, wanted: EngineJob) -> dict[str, Any]:
        arguments = stock_call(wanted)
        negative = arguments.pop("negative_prompt")
        if wanted.params.guidance_scale <= 1:
            negative = None
        elif negative is None and not isinstance(self._compel, CompelForSDXL):
            negative = ""  # SDXL takes zeros in place of an empty negative prompt.
        found = self._compel([arguments.pop("prompt")], negative_prompt=negative)
        pooled = found.pooled_embeds
        if self._pooled_prompt and pooled is not None:
            # compel pools the prompt with its syntax.
            pooled = self._pipeline.encode_prompt(self._pooled_prompt)[2]
        given = {
            "prompt_embeds": found.embeds,
            "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": found.negative_embeds,
            "negative_pooled_prompt_embeds": found.negative_pooled_embeds,
        }
        return {**arguments, **{key: value for key, value in given.items() if value is not None}}


@pytest.fixture(scope="module", params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[name](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def denoiser(folder: Path) -> Counting:
    return Counting.load(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def engine(denoiser: Counting) -> Iterator[Engine]:
    with running(denoiser) as opened:
        yield opened


@pytest.mark.parametrize("negative_prompt", ["", "fog", LONGER], ids=["none", "short", "longer"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_long_prompt_gives_the_image_of_compel_and_the_stock_pipeline(
    name: str, folder: Path, engine: Engine, guidance_scale: float, negative_prompt: str
) -> None:
    wanted = job(prompt=LONG, negative_prompt=negative_prompt, guidance_scale=guidance_scale)
    events = run(engine, wanted)
    (theirs,) = CompelStock(folder, name).images(wanted)
    assert difference(images(events)[0], theirs) <= BOUND
    (done,) = events[-1:]
    assert isinstance(done, JobDone)
    assert done.warnings == ()


# Each prompt in the syntax of the service, and in that of compel.
WEIGHTED = {
    "up": ("a (red:1.5) boat", "a (red)1.5 boat"),
    "down": ("a (red:0.4) boat", "a (red)0.4 boat"),
    "nested": ("a (red (boat):1.2)", "a (red (boat)1.1)1.2"),
    "brackets": ("a [red boat]", f"a (red boat){1 / 1.1}"),
    "long": (LONG + " (with a garden:1.4)", LONG + " (with a garden)1.4"),
    "chunks": ("a boat BREAK a (red:1.3) sea", '("a boat", "a (red)1.3 sea").and()'),
}


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights_change_the_image_as_compel_does(
    name: str, folder: Path, engine: Engine, kind: str
) -> None:
    prompt, of_compel = WEIGHTED[kind]
    options: dict[str, Any] = {"negative_prompt": "fog", "guidance_scale": 7.5, "strength": 0.9}
    weighted = job(prompt=prompt, prompt_weights=True, **options)
    (ours,) = images(run(engine, weighted))
    plain = plain_text(parse(prompt))
    stock = CompelStock(folder, name, pooled_prompt=plain)
    assert difference(ours, stock.images(job(prompt=of_compel, **options))[0]) <= BOUND
    (unweighted,) = images(run(engine, job(prompt=plain, **options)))
    assert difference(ours, unweighted) > 0
    (text,) = images(run(engine, job(prompt=prompt, **options)))
    assert difference(ours, text) > BOUND


def test_a_prompt_without_weights_gives_the_same_image_with_prompt_weights(
    engine: Engine,
) -> None:
    prompts = {r"a boat": False, "a  boat": True, "(a boat:1)": True}
    found = [
        images(run(engine, job(prompt=prompt, prompt_weights=is_weighted, guidance_scale=5.0)))[0]
        for prompt, is_weighted in prompts.items()
    ]
    assert all((found[0] == other).all() for other in found[1:])


def test_chunks_that_are_not_read_are_announced(engine: Engine) -> None:
    prompt = "a BREAK " * (max_chunks(LENGTH) + 1)
    done = run(engine, job(prompt=prompt, prompt_weights=True))[-1]
    assert isinstance(done, JobDone)
    most = max_chunks(LENGTH)
    warning = f"Of the {most + 1} chunks of the prompt, the first {most} are read."
    assert done.warnings == (warning,)


def test_words_behind_the_first_window_change_the_image(engine: Engine) -> None:
    one, other = (
        images(run(engine, job(prompt=f"{LONGER} {end}", guidance_scale=5.0)))[0]
        for end in ("red", "blue")
    )
    assert difference(one, other) > BOUND


def test_rows_with_different_numbers_of_chunks_share_a_batch(
    engine: Engine, denoiser: Counting
) -> None:
    requests = [
        job(job_id=number, prompt=prompt, negative_prompt=negative, guidance_scale=scale)
        for number, (prompt, negative, scale) in enumerate(
            [(SHORT, "", 1.0), (LONG, "fog", 5.0), (LONGER, "", 1.0), (SHORT, LONG, 5.0)], 1
        )
    ]
    alone = [images(run(engine, wanted))[0] for wanted in requests]
    denoiser.batches.clear()
    inboxes = [ReplyInbox() for _ in requests]
    for wanted, inbox in zip(requests, inboxes, strict=True):
        engine.submit(wanted, inbox)
    together = [images(inbox.all())[0] for inbox in inboxes]
    assert max(map(difference, alone, together)) <= BOUND
    assert max(len(lengths) for lengths in denoiser.batches) > 1


@pytest.mark.parametrize(
    ("chunks", "is_compiled", "expected"),
    [
        ([1, 1], False, None),
        ([3, 3], False, None),
        ([1, 3], False, 3),
        ([1, 1], True, None),
        ([2, 2], True, max_chunks(LENGTH)),
        ([1, 5], True, max_chunks(LENGTH)),
        ([max_chunks(LENGTH)], True, max_chunks(LENGTH)),
    ],
)
def test_batches_of_compiled_models_have_one_of_two_lengths(
    chunks: list[int], is_compiled: bool, expected: int | None
) -> None:
    rows = [torch.ones(count * LENGTH, 2) for count in chunks]
    tokens, mask = pad_chunks(rows, LENGTH, is_compiled)
    if expected is None:
        assert mask is None
        assert torch.equal(tokens, torch.stack(rows))
        return
    assert mask is not None
    assert tokens.shape == (len(rows), expected * LENGTH, 2)
    assert mask.sum(1).tolist() == [len(row) for row in rows]
    assert torch.equal(tokens[..., 0] == 1, mask)


def test_a_compiled_model_is_warmed_up_with_every_length(folder: Path) -> None:
    options = ModelOptions(compile=Compile.REGIONAL)
    denoiser = DiffusersDenoiser(
        Counting.load(str(folder), torch.device("cpu"), torch.float32)._model.pipeline, options
    )
    texts = [
        TextInput(prompt=prompt, negative_prompt="", guidance_scale=1.0, height=64, width=64)
        for prompt in denoiser.warm_up_prompts
    ]
    with torch.inference_mode():
        encoded = denoiser.encode_texts(texts)
    rows = [conditioning.prompt.tensors["tokens"] for conditioning in encoded]
    lengths = {pad_chunks([row], LENGTH, is_compiled=True)[0].shape[1] for row in rows}
    assert lengths == {LENGTH, max_chunks(LENGTH) * LENGTH}


def test_two_hundred_words_that_differ_at_the_end_give_different_images() -> None:
    engine = load_engine(EngineOptions.of(Settings()))
    try:
        words = "an oil painting of a house " * 33
        one, other = (
            run(
                engine,
                job(
                    prompt=words + end,
                    init_image=blocks(64, 64),
                    num_inference_steps=2,
                    guidance_scale=4.0,
                    strength=0.9,
                ),
            )
            for end in ("at night", "in snow")
        )
        assert len(words.split()) >= 198
        for events in (one, other):
            assert isinstance(events[-1], JobDone), events[-1]
            assert events[-1].warnings == ()
        assert difference(images(one)[0], images(other)[0]) > BOUND
    finally:
        engine.stop()
