"""Textual inversion embeddings: the images are those of the stock pipeline with the same file."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compel import CompelForSD
from safetensors.torch import save_file
from torch import Tensor

from img2img_server.engine import engine as engine_module
from img2img_server.engine.base import EngineJob, JobStopped, JobSuspended
from img2img_server.engine.denoiser import Conditioning, TextInput
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions, ModelOptions
from img2img_server.imaging.base import Pixels
from img2img_server.settings import Settings
from tests.engine_bench import (
    BOUND,
    SECONDS,
    Stock,
    difference,
    images,
    job,
    run,
    running,
    stock_call,
)
from tests.oracle.harness import models
from tests.tiny_models import WIDTH, write_sd, write_sdxl

# The tokenizers of the small models know single letters only, and read 14 of them in a window.
LONG = "a boat on the sea and a house on the hill "
WRITERS: Mapping[str, Callable[[Path], Path]] = {"sd": write_sd, "sdxl": write_sdxl}


def vectors(count: int, seed: int = 1) -> Tensor:
    return torch.randn((count, WIDTH), generator=torch.Generator().manual_seed(seed))


# Form: the tensors of the file `worn.safetensors`, and the token of prompts.
FORMS: dict[str, tuple[dict[str, Tensor], str]] = {
    "learned-embeds": ({"<toy>": vectors(1)[0]}, "<toy>"),
    "several-vectors": ({"<toy>": vectors(3)}, "<toy>"),
    "emb-params": ({"emb_params": vectors(2)}, "worn"),
}


@pytest.fixture(scope="module", params=WRITERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS[name](tmp_path_factory.mktemp("model"))


def load(model: Path, folder: Path, **tensors: Mapping[str, Tensor]) -> DiffusersDenoiser:
    """Loads a model with files of embeddings, by their names."""
    for stem, content in tensors.items():
        save_file(dict(content), folder / f"{stem}.safetensors")
    options = ModelOptions(embeddings_dir=folder)
    return DiffusersDenoiser.load(str(model), torch.device("cpu"), torch.float32, options)


def request_of(prompt: str, **changes: Any) -> EngineJob:
    return job(prompt=prompt, **{"guidance_scale": 5.0, "strength": 0.9, **changes})


def image_of(denoiser: DiffusersDenoiser, wanted: EngineJob) -> Pixels:
    with running(denoiser) as engine:
        (image,) = images(run(engine, wanted))
    return image


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_that_of_the_stock_pipeline_with_the_file(
    form: str, model: Path, tmp_path: Path
) -> None:
    tensors, token = FORMS[form]
    stock = Stock(model)
    (vector,) = tensors.values()
    stock._pipeline.load_textual_inversion(vector, token=token)
    wanted = request_of(f"a {token} boat", negative_prompt=f"fog {token}")
    (theirs,) = stock.images(wanted)
    denoiser = load(model, tmp_path, worn=tensors)

    assert denoiser.embeddings == (token,)
    assert difference(image_of(denoiser, wanted), theirs) <= BOUND
    plain = image_of(load(model, tmp_path / "none"), wanted)
    assert difference(plain, theirs) > BOUND


def test_both_encoders_of_sdxl_get_their_vectors(tmp_path: Path) -> None:
    model = write_sdxl(tmp_path / "model")
    tensors = {"clip_l": vectors(2), "clip_g": vectors(3, seed=2)}
    stock = Stock(model)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        stock._pipeline.load_textual_inversion(
            tensors[key],
            token="worn",
            tokenizer=getattr(stock._pipeline, f"tokenizer{end}"),
            text_encoder=getattr(stock._pipeline, f"text_encoder{end}"),
        )
    wanted = request_of("a worn boat")
    (theirs,) = stock.images(wanted)
    (tmp_path / "files").mkdir()
    denoiser = load(model, tmp_path / "files", worn=tensors)
    assert denoiser.embeddings == ("worn",)
    assert difference(image_of(denoiser, wanted), theirs) <= BOUND


def test_long_and_weighted_prompts_use_all_vectors_as_with_compel(tmp_path: Path) -> None:
    model = write_sd(tmp_path / "model")
    tensors = {"emb_params": vectors(3)}
    syntax: dict[str, str] = {}

    def call(wanted: EngineJob) -> dict[str, Any]:
        arguments = stock_call(wanted)
        negative = arguments.pop("negative_prompt") or ""
        prompt = syntax[arguments.pop("prompt")]
        found = compel([prompt], negative_prompt=negative)
        embeds = {"prompt_embeds": found.embeds, "negative_prompt_embeds": found.negative_embeds}
        return {**arguments, **embeds}

    stock = Stock(model, call)
    stock._pipeline.load_textual_inversion(tensors["emb_params"], token="worn")
    compel: Any = CompelForSD(stock._pipeline)
    (tmp_path / "files").mkdir()
    denoiser = load(model, tmp_path / "files", worn=tensors)
    # compel reads the tokens of the vectors as words.
    of_compel = "worn worn_1 worn_2"
    for prompt, theirs in {
        f"{LONG} worn": f"{LONG} {of_compel}",
        "a (worn:1.4) boat": f"a ({of_compel})1.4 boat",
    }.items():
        syntax[prompt] = theirs
        wanted = request_of(prompt, prompt_weights="(" in prompt)
        ours = image_of(denoiser, wanted)
        assert difference(ours, stock.images(wanted)[0]) <= BOUND, prompt


def test_embeddings_whose_names_begin_alike_get_their_own_vectors(tmp_path: Path) -> None:
    """Names in capitals are read, too: the tokenizer of CLIP has small letters only."""
    model = write_sd(tmp_path / "model")
    toy, other = vectors(2), vectors(3, seed=2)
    stock = Stock(model)
    alone = [f"q{letter}" for letter in "abcde"]  # one token for each vector
    for token, vector in zip(alone, torch.cat([toy, other]), strict=True):
        stock._pipeline.load_textual_inversion(vector, token=token)
    (theirs,) = stock.images(request_of(f"a {' '.join(alone)}"))
    (tmp_path / "files").mkdir()
    content = {"toy": {"emb_params": toy}, "toy2": {"emb_params": other}}
    denoiser = load(model, tmp_path / "files", **content)
    for prompt in ("a toy toy2", "a toytoy2", "a TOY Toy2"):
        assert difference(image_of(denoiser, request_of(prompt)), theirs) <= BOUND, prompt


REFUSED: dict[str, tuple[dict[str, Tensor] | str, str]] = {
    "wide": ({"emb_params": torch.ones(1, 1024)}, "instead of 16: it belongs to another family"),
    "cube": ({"emb_params": torch.ones(2, 2, WIDTH)}, "instead of vectors of 16 numbers"),
    "nan": ({"emb_params": torch.full((1, WIDTH), torch.nan)}, "not finite: fetch the file again"),
    "many": ({"emb_params": torch.ones(99, WIDTH)}, "has 99 vectors, but 14 tokens are read"),
    "lora": ({"a.lora_up": vectors(1), "a.lora_down": vectors(1)}, "no textual inversion embed"),
    "a": ({"emb_params": vectors(1)}, "its token 'a' is one of the model's own: rename the file"),
    "second": ({"first": vectors(1)}, "its token first is that of first"),
    "first_1": ({"emb_params": vectors(1)}, "its token first_1 is that of first"),
    "first_2": ({"emb_params": vectors(1)}, "its token first_2 is that of first"),
    "page": ("<!doctype html><html></html>", "is an HTML or XML page"),
    "pointer": ("version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "both": ({"clip_l": vectors(1), "clip_g": vectors(1)}, "clip_g is for text_encoder_2, which"),
}


def test_files_that_do_not_fit_are_logged_with_the_reason_and_the_others_are_offered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, folder = write_sd(tmp_path / "model"), tmp_path / "files"
    folder.mkdir()
    for stem, (content, _) in REFUSED.items():
        file = folder / f"{stem}.safetensors"
        if isinstance(content, str):
            file.write_text(content)
        else:
            save_file(content, file)
    (folder / "old.pt").write_bytes(b"\x80\x02")
    for preview in ("good.png", "good.preview.png", "neg.v2.webp"):
        (folder / preview).touch()
    denoiser = load(
        model,
        folder,
        first={"emb_params": vectors(2)},
        good={"emb_params": vectors(1)},
        **{"neg.v2": {"emb_params": vectors(1)}},
    )

    assert denoiser.embeddings == ("first", "good", "neg.v2")
    own = [it for it in caplog.records if it.name.startswith("img2img_server")]
    refused = [it.getMessage() for it in own if it.levelno >= logging.WARNING]
    for stem, (_, why) in REFUSED.items():
        (line,) = (
            it for it in refused if it.startswith(f"embedding_refused: {stem}"[:40]) and why in it
        )
        assert "Traceback" not in line
    ignored = [
        it for it in refused if it.startswith("embedding_ignored: old.pt is no .safetensors")
    ]
    assert len(refused) == len(REFUSED) + len(ignored) == len(REFUSED) + 1
    assert all(not it.exc_info for it in caplog.records)


def test_a_file_that_arrives_or_goes_while_the_engine_runs_takes_effect(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LORA_WATCH_SECONDS", 0.01)
    changes: list[tuple[str, ...]] = []
    changed = threading.Condition()
    offer = engine_module.DiffusionEngine._offer

    def noted(engine: engine_module.DiffusionEngine, kind: str, found: Any) -> None:
        with changed:
            offer(engine, kind, found)
            changes.append(found.names)
            changed.notify_all()

    def wait_for(names: tuple[str, ...]) -> None:
        with changed:
            assert changed.wait_for(lambda: bool(changes) and changes[-1] == names, SECONDS)

    monkeypatch.setattr(engine_module.DiffusionEngine, "_offer", noted)
    folder, apart = tmp_path / "files", tmp_path / "apart"
    for each in (folder, apart):
        each.mkdir()
    save_file({"emb_params": vectors(2)}, apart / "worn.safetensors")
    wanted = request_of("a worn boat")
    expected = image_of(load(model, apart), wanted)
    settings = Settings(model=str(model), embeddings_dir=folder, warm_up_sizes="64x64")
    engine = load_engine(EngineOptions.of(settings))
    try:
        (plain,) = images(run(engine, wanted))
        key = engine.state_key
        shutil.copy(apart / "worn.safetensors", folder)
        wait_for(("worn",))
        assert engine.model.embeddings == ("worn",)
        assert engine.state_key != key, "another worker must have the same files"
        (worn,) = images(run(engine, wanted))
        (folder / "worn.safetensors").unlink()
        wait_for(())
        (again,) = images(run(engine, wanted))
    finally:
        engine.stop()

    assert difference(worn, expected) == 0
    assert difference(plain, again) == 0
    assert difference(plain, worn) > BOUND


def test_a_file_that_is_overwritten_in_place_changes_nothing_until_it_is_read_again(
    tmp_path: Path,
) -> None:
    model, apart = write_sd(tmp_path / "model"), tmp_path / "apart"
    apart.mkdir()
    wanted = request_of("a worn boat")
    expected = image_of(load(model, apart, worn={"emb_params": vectors(2)}), wanted)
    denoiser = load(model, tmp_path, worn={"emb_params": vectors(2)})
    save_file({"emb_params": vectors(2, seed=2)}, apart / "other")
    with (tmp_path / "worn.safetensors").open("r+b") as file:
        file.write((apart / "other").read_bytes())

    assert difference(image_of(denoiser, wanted), expected) == 0


def test_a_file_that_is_too_large_is_refused_without_being_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = 2**26 // (4 * WIDTH)
    end = rows * 4 * WIDTH
    entry = {"dtype": "F32", "shape": [rows, WIDTH], "data_offsets": [0, end]}
    header = json.dumps({"emb_params": entry}).encode()
    with (tmp_path / "worn.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)

    assert load(write_sd(tmp_path / "model"), tmp_path).embeddings == ()
    assert f"it has {8 + len(header) + end} bytes, more than" in caplog.text


class Interrupted(DiffusersDenoiser):
    """The real denoiser, which calls a function before the third step, and one before it encodes
    prompts the next time.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps = 0
        self.before_third: Callable[[], None] = lambda: None
        self.before_encode: Callable[[], None] = lambda: None

    def encode_texts(self, texts: Sequence[TextInput]) -> list[Conditioning]:
        before, self.before_encode = self.before_encode, lambda: None
        before()
        return super().encode_texts(texts)

    def denoise(
        self, latents: Sequence[Tensor], timesteps: Tensor, conditionings: Sequence[Conditioning]
    ) -> Sequence[Tensor]:
        self.steps += 1
        if self.steps == 3:
            self.before_third()
        return super().denoise(latents, timesteps, conditionings)


def interrupted(folder: Path) -> Interrupted:
    """Returns a denoiser with the embedding `worn`, whose file and model are in the folder."""
    save_file({"emb_params": vectors(2)}, folder / "worn.safetensors")
    options = ModelOptions(embeddings_dir=folder)
    model = str(write_sd(folder / "model"))
    return Interrupted.load(model, torch.device("cpu"), torch.float32, options)


def replace_embedding(denoiser: Interrupted, folder: Path) -> None:
    """Replaces the file of the embedding, and makes the denoiser offer the new one."""
    save_file({"emb_params": vectors(2, seed=2)}, folder / ".new")
    (folder / ".new").rename(folder / "worn.safetensors")
    assert [denoiser.refresh_embeddings() for _ in range(2)] == [False, True]


def test_a_job_whose_embedding_was_replaced_is_suspended_without_a_state(tmp_path: Path) -> None:
    denoiser = interrupted(tmp_path)
    wanted = request_of("a worn boat", num_inference_steps=6)

    def suspended(change: Callable[[], None]) -> object:
        def change_and_suspend() -> None:
            change()
            engine.suspend(wanted.job_id)

        denoiser.steps, denoiser.before_third = 0, change_and_suspend
        return run(engine, wanted)[-1]

    with running(denoiser) as engine:
        assert isinstance(suspended(lambda: None), JobSuspended)
        assert isinstance(suspended(lambda: replace_embedding(denoiser, tmp_path)), JobStopped)
        assert isinstance(suspended(lambda: None), JobSuspended), "it is encoded with the new file"


@pytest.mark.parametrize("continues", [True, False], ids=["continued", "new"])
def test_a_job_keeps_the_embedding_that_was_there_when_it_began(
    continues: bool, tmp_path: Path
) -> None:
    """The file is replaced after the engine has begun with the job and before its first encode."""
    denoiser = interrupted(tmp_path)
    wanted = request_of("a worn boat", num_inference_steps=6)
    expected = image_of(denoiser, wanted)
    state = None
    if continues:
        with running(denoiser) as engine:
            denoiser.steps, denoiser.before_third = 0, lambda: engine.suspend(wanted.job_id)
            suspended = run(engine, wanted)[-1]
        assert isinstance(suspended, JobSuspended)
        state = suspended.state

    denoiser.before_third = lambda: None
    denoiser.before_encode = lambda: replace_embedding(denoiser, tmp_path)
    with running(denoiser) as engine:
        (image,) = images(run(engine, replace(wanted, state=state)))
        assert difference(image, expected) == 0
        (image,) = images(run(engine, wanted))
    assert difference(image, expected) > BOUND, "the next job has the new file"


def test_a_family_without_embeddings_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = models()["flux dev"].write(tmp_path / "model")
    assert load(model, tmp_path, worn={"emb_params": vectors(1)}).embeddings == ()
    assert "embeddings_without_effect: models of the family flux take none" in caplog.text
