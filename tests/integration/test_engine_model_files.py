"""Model folders as people have them: variants, absent parts, damaged and incomplete files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.parts import prove_parts
from img2img_server.engine.family import ModelError
from img2img_server.engine.options import ModelOptions
from img2img_server.imaging.base import Pixels
from tests.engine_bench import BOUND, difference, images, job, run, running
from tests.oracle.harness import families
from tests.tiny_models import write_sd

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


@pytest.fixture(scope="module")
def plain(written: Path) -> Pixels:
    return made(written)


def load(folder: Path, options: ModelOptions | None = None) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(str(folder), torch.device("cpu"), torch.float32, options)


def made(folder: Path, options: ModelOptions | None = None) -> Pixels:
    with running(load(folder, options)) as engine:
        return images(run(engine, job(guidance_scale=4.0)))[0]


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_variants_are_found_for_each_part_by_itself(folder: Path, plain: Pixels) -> None:
    for file in (UNET, TEXT):
        path = folder / file
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))

    assert difference(made(folder), plain) == 0


def test_pickles_give_the_same_image_where_they_are_allowed(folder: Path, plain: Pixels) -> None:
    for file, name in ((UNET, "diffusion_pytorch_model.bin"), (TEXT, "pytorch_model.bin")):
        path = folder / file
        torch.save(load_file(path), path.with_name(name))
        path.unlink()

    with pytest.raises(ModelError, match="is a pickle, which can run code"):
        load(folder)
    assert difference(made(folder, ModelOptions(allow_pickles=True)), plain) == 0


def test_parts_that_are_not_used_are_not_demanded(folder: Path, plain: Pixels) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")

    assert difference(made(folder), plain) == 0


def test_copies_and_state_of_a_training_are_ignored(folder: Path, plain: Pixels) -> None:
    extra = {
        "model_ema.decay": torch.ones(1),
        "optimizer.state.0": torch.ones(3),
        "text_model.embeddings.position_ids": torch.arange(16)[None],
        "logit_scale": torch.ones(()),
    }
    change(folder / TEXT, lambda tensors: tensors.update(extra))

    assert difference(made(folder), plain) == 0


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[3]]


def test_each_damage_is_named(folder: Path, written: Path) -> None:
    def restored() -> None:
        shutil.rmtree(folder)
        shutil.copytree(written, folder)

    def expect(sentence: str) -> None:
        with pytest.raises(ModelError, match=sentence):
            load(folder)
        with pytest.raises(ModelError, match=sentence):
            prove_parts(folder)
        restored()

    for file in (UNET, TEXT, VAE):
        part = file.partition("/")[0]
        change(folder / file, drop_one)
        expect(f"model/{part} is incomplete: its weights lack ")
        change(folder / file, lambda tensors: tensors.update({"adapter.new": torch.ones(1)}))
        expect(f"model/{part} has weights .* would be ignored: adapter.new")
        (folder / file).write_bytes((folder / file).read_bytes()[:-100])
        expect(f"{file} is cut off")
        shutil.rmtree(folder / part)
        expect(f"the model has no folder .*model/{part}")
    shutil.rmtree(folder / "tokenizer")
    expect("the model has no folder .*model/tokenizer, which CLIPTokenizer needs")
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    expect("cannot load .*tokenizer|the tokenizer of .* knows .* tokens")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["my_code", "MyUNet"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    expect("names my_code.MyUNet for unet, .*Code that comes with a model is not run")


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {word: at for word, at in vocab.items() if at < 30 or "|" in word}
    tokenizer.write_text(json.dumps(content), encoding="utf-8")

    with pytest.raises(ModelError, match=r"the tokenizer of .* knows .* but its text_encoder has"):
        load(folder)


def test_files_that_are_overwritten_do_not_change_a_loaded_model(
    folder: Path, plain: Pixels
) -> None:
    denoiser = load(folder)
    for file in (UNET, TEXT, VAE):
        with (folder / file).open("r+b") as opened:  # as an S3 sync or `rsync --inplace` does
            size = (folder / file).stat().st_size
            opened.write(bytes(size - size // 2))
            opened.truncate(size // 2)

    with running(denoiser) as engine:
        found = images(run(engine, job(guidance_scale=4.0)))[0]
    assert difference(found, plain) <= BOUND


@pytest.mark.parametrize("family", sorted(families()))
def test_the_parts_of_every_family_are_proven_to_load(family: str, tmp_path: Path) -> None:
    model = next(iter(families()[family].values()))

    prove_parts(model.write(tmp_path))
