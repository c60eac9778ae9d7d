"""Single-file checkpoints give the images of diffusers' own loader; others are named."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from img2img_server.engine.checkpoint import _unused_layers
from img2img_server.engine.checkpoint_file import read_checkpoint
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.local_model import find_model
from img2img_server.engine.diffusers.weights_size import weights_size
from img2img_server.engine.family import ModelError
from img2img_server.engine.load import load_denoiser, load_engine
from img2img_server.engine.model_spec import ModelDefaults, read_model_spec
from img2img_server.engine.options import EngineOptions, ModelOptions
from img2img_server.settings import Settings
from tests.engine_bench import BOUND, difference, images, job, run, running
from tests.original_layout import (
    clip_config,
    clip_tensors,
    write,
    write_sd1,
    write_sd2,
    write_sdxl,
)

WRITERS: dict[str, Callable[[Path], tuple[Any, Path]]] = {
    "sd1": write_sd1,
    "sd2": write_sd2,
    "sdxl": write_sdxl,
}


WANTED: dict[str, Any] = {"guidance_scale": 4.0, "negative_prompt": "blurry, low quality"}


@dataclass(frozen=True)
class Written:
    """A model as a single file and as a directory in diffusers' layout."""

    file: Path
    folder: Path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    made: dict[str, Written] = {}

    def write(kind: str) -> Written:
        if kind not in made:
            place = tmp_path_factory.mktemp(kind)
            pipeline, file = WRITERS[kind](place)
            pipeline.save_pretrained(place / "folder")
            made[kind] = Written(file, place / "folder")
        return made[kind]

    return write


def load(source: Path, options: ModelOptions | None = None) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(str(source), torch.device("cpu"), torch.float32, options)


def made_by(denoiser: DiffusersDenoiser, scheduler: str) -> Any:
    with running(denoiser) as engine:
        return images(run(engine, job(**WANTED, scheduler=scheduler)))[0]


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_single_file_gives_the_images_of_the_stock_loader(
    kind: str, written: Callable[[str], Written]
) -> None:
    model = written(kind)
    spec = read_model_spec(str(model.file))
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    ours = find_model(str(model.folder))
    pipeline_class = getattr(diffusers, ours.family.pipelines[ours.files.class_name])
    stock = pipeline_class.from_single_file(str(model.file), config=str(model.folder))
    found = made_by(load(model.file), spec.scheduler)
    expected = made_by(DiffusersDenoiser(stock), spec.scheduler)

    assert difference(found, expected) <= BOUND
    assert found.std() > 10, "the image has contrast"


def test_a_file_that_the_operator_names_lcm_gives_the_images_of_the_lcm_scheduler(
    written: Callable[[str], Written],
) -> None:
    model = written("sd1")
    options = EngineOptions.of(Settings(model=str(model.file), model_name="photo-lcm"))
    denoiser, spec = load_denoiser(options)
    stock = diffusers.StableDiffusionImg2ImgPipeline.from_single_file(
        str(model.file), config=str(model.folder)
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stock.scheduler = diffusers.LCMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)
    found = made_by(denoiser, spec.scheduler)
    expected = made_by(DiffusersDenoiser(stock), "lcm")

    assert (spec.scheduler, spec.num_inference_steps, spec.guidance_scale) == ("lcm", 8, 1.5)
    assert difference(found, expected) <= BOUND


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_single_file_is_described_like_its_directory(
    kind: str, written: Callable[[str], Written]
) -> None:
    model = written(kind)
    found, expected = (read_model_spec(str(it)) for it in (model.file, model.folder))

    assert found.name == model.file.stem
    for field in ("family", "scheduler", "schedulers", "native_size", "num_inference_steps"):
        assert getattr(found, field) == getattr(expected, field), field


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_the_derived_configurations_are_those_of_the_directory(
    kind: str, written: Callable[[str], Written]
) -> None:
    model = written(kind)
    found, expected = find_model(str(model.file)).files, find_model(str(model.folder)).files
    for part in found.configs:
        for key, value in found.configs[part].items():
            if key in expected.configs[part] and key not in ("architectures", "model_type"):
                other = expected.configs[part][key]
                same = list(other) if isinstance(other, list | tuple) else other
                if part == "vae" and key == "sample_size":
                    continue  # only for tiling
                if key == "transformer_layers_per_block" and isinstance(other, int):
                    same = [other] * len(value)
                assert value == same, f"{part} {key}"


def edited(file: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(file)
    for name, tensor in changes.items():
        if tensor is None:
            tensors = {key: it for key, it in tensors.items() if not key.startswith(name)}
        else:
            tensors[name] = tensor
    save_file(tensors, to)
    return to


def test_a_missing_part_is_taken_from_the_folder_of_parts(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    model = written("sd1")
    file = edited(model.file, tmp_path / "no_vae.safetensors", **{"first_stage_model.": None})
    with pytest.raises(ModelError, match=r"no_vae\.safetensors does not hold the vae .*PARTS_DIR"):
        load(file)
    with pytest.raises(ModelError, match=r"there is no folder .*sd/vae") as caught:
        load(file, ModelOptions(model_parts_dir=tmp_path))
    assert caught.value.setting == "model_parts_dir"
    (tmp_path / "sd").symlink_to(model.folder)

    expected = made_by(load(model.file), "pndm")
    for folder in (tmp_path, model.folder):  # That of a model works as well.
        found = made_by(load(file, ModelOptions(model_parts_dir=folder)), "pndm")
        assert difference(found, expected) == 0


def weights(denoiser: DiffusersDenoiser, part: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = getattr(denoiser._model.pipeline, part).state_dict()
    return found


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."], ids=["none", "short"])
def test_a_file_of_a_unet_alone_may_leave_out_the_beginning_of_its_names(
    prefix: str, written: Callable[[str], Written], tmp_path: Path
) -> None:
    model, start = written("sd1"), "model.diffusion_model."
    tensors = {
        prefix + key.removeprefix(start): it
        for key, it in load_file(model.file).items()
        if key.startswith(start)
    }
    save_file(tensors, file := tmp_path / "unet.SAFETENSORS")

    found = load(file, ModelOptions(model_parts_dir=model.folder))
    assert_equal(weights(found, "unet"), weights(load(model.file), "unet"))


def test_a_tensor_under_two_names_is_refused(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    changes: dict[str, torch.Tensor | None] = {"out.2.bias": torch.ones(4)}
    file = edited(written("sd1").file, tmp_path / "merged.safetensors", **changes)
    with pytest.raises(ModelError, match=r"under two names, .*: out\.2\.bias: use a file"):
        load(file)


def test_an_encoder_without_the_unused_layer_loses_no_other_one(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    """Files that were converted from diffusers' layout do not have the layer."""
    model, text = written("sd2"), "cond_stage_model.model."
    unused: dict[str, torch.Tensor | None] = {
        f"{text}transformer.resblocks.2.": None,
        f"{text}text_projection": None,
    }
    found = load(edited(model.file, tmp_path / "converted.safetensors", **unused))
    assert_equal(weights(found, "text_encoder"), weights(load(model.folder), "text_encoder"))


@pytest.mark.parametrize(("layers", "used"), [(24, 23), (23, 23)])
def test_the_encoder_of_stable_diffusion_2_has_23_layers(layers: int, used: int) -> None:
    start = "cond_stage_model.model.transformer.resblocks"
    names = [f"{start}.{number}.ln_1.weight" for number in range(layers)]
    for extra in ([], ["cond_stage_model.model.text_projection"]):
        shapes = dict.fromkeys([*names, *extra], (1,))
        assert layers - _unused_layers(shapes) == used


def test_tensors_of_an_encoder_that_no_image_needs_are_ignored(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    model = written("sd1")
    name = "cond_stage_model.transformer.vision_model.post_layernorm.weight"
    file = edited(model.file, tmp_path / "vision.safetensors", **{name: torch.ones(3)})
    assert_equal(weights(load(file), "text_encoder"), weights(load(model.file), "text_encoder"))


def test_the_size_of_a_model_counts_every_part(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    model, start = written("sd1"), "model.diffusion_model."
    tensors = {
        key.removeprefix(start): it
        for key, it in load_file(model.file).items()
        if key.startswith(start)
    }
    save_file(tensors, file := tmp_path / "unet.safetensors")
    cpu, options = torch.device("cpu"), EngineOptions(model_parts_dir=model.folder)
    sizes = [weights_size(find_model(str(it)), options, cpu) for it in (file, model.folder)]
    assert sizes[0] == sizes[1] > 4 * sum(it.numel() for it in tensors.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model.diffusion_model.new.weight": torch.ones(3)},
            "the unet in .* has tensors of 3 ",
        ),
        ({"control.weight": torch.ones(3)}, "are of no part of its model .*: control.weight"),
        ({"model.diffusion_model.out.0.": None}, "the unet in .* lack conv_norm_out"),
        ({"first_stage_model.quant_conv.bias": None}, "the vae in .* lack quant_conv.bias"),
        (
            {"cond_stage_model.transformer.text_model.final_layer_norm.": None},
            "the text_encoder in .* lack final_layer_norm",
        ),
        ({"model.diffusion_model.": None}, "is no checkpoint of a layout that is known"),
        ({"edm_mean": torch.ones(1)}, "is an EDM model"),
    ],
    ids=["unet-more", "more", "unet-less", "vae-less", "text-less", "no-unet", "edm"],
)
def test_a_checkpoint_with_more_or_less_than_its_model_is_refused(
    changes: dict[str, torch.Tensor | None],
    sentence: str,
    written: Callable[[str], Written],
    tmp_path: Path,
) -> None:
    file = edited(written("sd1").file, tmp_path / "model.safetensors", **changes)

    with pytest.raises(ModelError, match=sentence):
        load(file)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "is a LoRA, not a model"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "holds an autoencoder only"),
        (["emb_params"], "is a textual inversion embedding"),
        (["some.weight"], "is no checkpoint of a layout .*some.weight"),
        (["input_blocks.0.0.weight", "input_hint_block.0.weight"], "is a ControlNet"),
        (["double_blocks.0.img_attn.qkv.weight.absmax"], "has weights in 4 bits"),
        (["double_blocks.0.img_attn.qkv.weight_scale_2"], "has weights in 4 bits"),
    ],
    ids=["lora", "vae", "embedding", "other", "controlnet", "nf4", "nvfp4"],
)
def test_another_kind_of_file_is_named(names: list[str], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    save_file({name: torch.ones(1) for name in names}, file)

    with pytest.raises(ModelError, match=sentence):
        read_model_spec(str(file))


def test_a_folder_of_single_files_names_those_that_are_models(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    save_file({"decoder.conv_in.weight": torch.ones(1)}, tmp_path / "ae.safetensors")
    with pytest.raises(ModelError, match=r"ae\.safetensors holds an autoencoder only"):
        read_model_spec(str(tmp_path))

    # This copy of the weights, which is not used, does not make the file another kind.
    ema = {"model_ema.diffusion_model": torch.ones(1)}
    edited(written("sd1").file, tmp_path / "model.safetensors", **ema)
    with pytest.raises(ModelError, match=f"name it: {tmp_path}/model.safetensors$"):
        read_model_spec(str(tmp_path))

    shutil.copy(written("sd1").file, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"\(model.safetensors, other.safetensors\)"):
        read_model_spec(str(tmp_path))


def test_a_text_encoder_of_another_width_than_the_unet_takes_is_refused(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    model, prefix = written("sd1"), "cond_stage_model.transformer."
    wide = CLIPTextModel(clip_config(128, hidden_act="quick_gelu"))
    tensors = load_file(model.file)
    tensors = {name: it for name, it in tensors.items() if not name.startswith(prefix)}
    file = write(tmp_path / "mixed.safetensors", {**tensors, **clip_tensors(wide, prefix)})
    with pytest.raises(ModelError, match="gives 128 numbers for each token, but its unet takes 64"):
        load(file)


def test_an_inpainting_checkpoint_is_refused_by_its_channels(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    changes = {name: torch.zeros(64, 9, 3, 3)}
    file = edited(written("sd1").file, tmp_path / "inpaint.safetensors", **changes)

    with pytest.raises(ModelError, match="UNet has 9 input channels"):
        read_model_spec(str(file))


def test_the_operator_and_the_metadata_say_what_the_tensors_do_not(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    tensors = load_file(written("sdxl").file)
    file = tmp_path / "noob.safetensors"

    def scheduler(**metadata: str) -> Any:
        save_file(tensors, file, metadata=metadata)
        return read_checkpoint(file).files.scheduler

    assert scheduler()["prediction_type"] == "epsilon"
    given = {"modelspec.prediction_type": "v"}
    assert scheduler(**given)["prediction_type"] == "v_prediction"
    toml = 'name = "n"\nprediction_type = "epsilon"'
    file.with_suffix(".toml").write_text(toml, encoding="utf-8")
    assert scheduler(**given)["prediction_type"] == "epsilon"
    assert read_model_spec(str(file)).name == "n"
    file.with_suffix(".toml").unlink()
    tensors |= {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}
    found = scheduler()
    assert (found["prediction_type"], found["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_a_pickled_checkpoint_needs_permission_and_gives_the_same_image(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    model, file = written("sd1"), tmp_path / "model.ckpt"
    torch.save({"state_dict": load_file(model.file), "epoch": 3}, file)
    with pytest.raises(ModelError, match=r"model\.ckpt is a pickle, which can run code"):
        load(file)

    options = EngineOptions.of(
        Settings(model=str(file), allow_pickles=True, warm_up_sizes="", device="cpu")
    )
    engine = load_engine(options)
    try:
        spec, found = engine.model, images(run(engine, job(**WANTED, scheduler="pndm")))[0]
    finally:
        engine.stop()
    assert (spec.name, spec.schedulers[0], spec.native_size) == ("model", "pndm", 512)
    assert difference(found, made_by(load(model.file), "pndm")) == 0


def test_a_pickle_may_have_its_ending_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "model.CKPT").touch()
    with pytest.raises(ModelError, match=r"model\.CKPT is a pickle, which can run code"):
        read_model_spec(str(tmp_path / "model.CKPT"))
    allowed = ModelDefaults(allow_pickles=True)
    assert read_model_spec(str(tmp_path / "model.CKPT"), defaults=allowed).name == "model"


def test_clips_tokenizer_gives_the_published_numbers() -> None:
    from img2img_server.engine.diffusers.clip_tokenizer import clip_tokenizer

    numbers = clip_tokenizer()("a photo of an astronaut riding a horse on mars").input_ids
    published = [320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496]
    assert numbers == [49406, *published, 49407]
