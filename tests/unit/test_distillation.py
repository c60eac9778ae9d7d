"""Models that were distilled for few steps: how they are recognised, and their defaults."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest

from img2img_server.engine.checkpoint import CLIP, UNET, Hints, describe_unet
from img2img_server.engine.diffusers.families import detect, families
from img2img_server.engine.diffusers.local_model import find_model
from img2img_server.engine.diffusers.samplers import DIFFUSION_SAMPLERS, own_sampler
from img2img_server.engine.distillation import UNET_DISTILLATIONS
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.model_names import ModelName
from img2img_server.engine.model_spec import ModelDefaults, ModelSpec, read_model_spec
from tests.readme import ROOT

EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
SDXL, SD = "StableDiffusionXLPipeline", "StableDiffusionPipeline"
PLAIN = 20, 7.5


def defaults(class_name: str, name: str, **configs: dict[str, Any]) -> tuple[int, float, str]:
    files = ModelFiles({"_class_name": class_name}, configs, (name,))
    found = detect(files, name).traits(files)
    return found.num_inference_steps, found.guidance_scale, found.scheduler


@pytest.mark.parametrize(
    ("name", "steps", "scale"),
    [
        # as published
        ("stabilityai/sdxl-turbo", 4, 0.0),
        ("sd_xl_turbo_1.0_fp16", 4, 0.0),
        ("SDXL-Turbo", 4, 0.0),
        ("sd-turbo", 4, 0.0),
        ("ByteDance/SDXL-Lightning", 8, 0.0),
        ("sdxl_lightning_4step", 4, 0.0),
        ("sdxl_lightning_8step_unet", 8, 0.0),
        ("Hyper-SDXL-1step-Unet", 1, 0.0),
        ("Hyper-SD15-8steps", 8, 0.0),
        ("Hyper-SDXL-12steps-CFG", 12, 5.0),
        ("dmd2_sdxl_4step_unet_fp16", 4, 0.0),
        ("sdxl-dmd2", 4, 0.0),
        ("latent-consistency/lcm-ssd-1b", 8, 1.5),
        ("sd-community/sdxl-flash", 7, 3.0),
        ("flash-sdxl", 4, 0.0),
        ("pcm_sdxl_smallcfg_4step_converted", 4, 0.0),
        ("pcm_sdxl_normalcfg_16step_converted", 16, 7.5),
        ("TCD-SDXL", 8, 0.0),
        ("IDKiro/sdxs-512-dreamshaper", 1, 0.0),
        # merges, in the spellings of model sites
        ("Lykon/dreamshaper-xl-v2-turbo", 8, 2.0),
        ("dreamshaperXL_v21TurboDPMSDE", 8, 2.0),
        ("TurboVisionXL", 8, 2.0),
        ("turbovisionxlSuperFastXLBasedOnNew_tvxlV431Bakedvae", 8, 2.0),
        ("SG161222/RealVisXL_V5.0_Lightning", 8, 0.0),
        ("realvisxlV50_v50LightningBakedvae", 8, 0.0),
        ("dreamshaperXL_lightningDPMSDE", 8, 0.0),
        ("juggernautXL_v9Rdphoto2Lightning", 8, 0.0),
        ("wildcardxXLLIGHTNING_wildcardxXL", 8, 0.0),
        ("RunDiffusion/Juggernaut-X-Hyper", 8, 0.0),
        ("realisticVisionV60B1_v51HyperVAE", 8, 0.0),
        ("dreamshaper_8LCM", 8, 1.5),
        ("sdxlturbo", 4, 0.0),
        ("somexllightning", 8, 0.0),
        ("cyberrealisticPony_v8DMD2", 4, 0.0),
        ("sdxlUnstableDiffusers_v11DPMPP2MSDETurbo", 8, 2.0),
        ("ponyDiffusion-V6-XL-Turbo-DPO", 8, 2.0),
        ("epicrealismXL_vxviLightningAnime", 8, 0.0),
        ("kohakuxl-lightning-4-steps", 4, 0.0),
        ("HyperSDXL8Steps", 8, 0.0),
        ("lightning4step-xl", 4, 0.0),
        ("sdxl_lightning_1step_x0", 1, 0.0),
        ("sdxl-turbo-anime", 8, 2.0),
        ("turbo", 8, 2.0),
        ("mySDXL_LIGHTNINGv1", 8, 0.0),
        ("photoXL_TURBOv2", 8, 2.0),
        ("AlbedoBaseXL_v2turbo", 8, 2.0),
        ("zavychromaxl_v70lightning", 8, 0.0),
        ("aamXLAnimeMix_v10HalfturboEulera", 8, 2.0),
        # no distilled models
        ("stabilityai/stable-diffusion-xl-base-1.0", *PLAIN),
        ("/data/turbo/dreamshaper", *PLAIN),
        ("/home/lightning/models/x", *PLAIN),
        ("/data/lcm/sd15", *PLAIN),
        ("lightning/photo-xl", *PLAIN),
        ("hyper-sd/photo-xl", *PLAIN),
        ("turbo/model.safetensors", *PLAIN),
        ("pytorch-lightning-sdxl", *PLAIN),
        ("lightning_logs", *PLAIN),
        ("lightning-strike-style", *PLAIN),
        ("zeus-lightning-bolts", *PLAIN),
        ("turbocharged-xl", *PLAIN),
        ("enlightning-xl", *PLAIN),
        ("hyperrealism-xl", *PLAIN),
        ("hyper-realistic-portraits-xl", *PLAIN),
        ("sdxl-hyper-realistic", *PLAIN),
        ("camera-flash-photos", *PLAIN),
        ("flashback-xl", *PLAIN),
        ("sdxl-undistilled-turbo", *PLAIN),
        ("sdxl-non-lightning", *PLAIN),
        ("segmind/small-sd-distilled", *PLAIN),
        ("segmind/SSD-1B", *PLAIN),
        ("sdxl-epoch-3-step-4", *PLAIN),
        ("checkpoint-4-steps", *PLAIN),
        ("sdxl-flash-photography", *PLAIN),
        ("pcm-audio-spectrogram", *PLAIN),
        ("tcd-sports", *PLAIN),
        ("DMD-logos-sdxl", *PLAIN),
        ("sdxl-lightning-free-photo", *PLAIN),
        ("turbo-car-xl", *PLAIN),
        ("thor-lightning-style-xl", *PLAIN),
    ],
)
def test_unets_are_known_by_the_words_of_their_own_name(
    name: str, steps: int, scale: float
) -> None:
    assert defaults(SDXL, name, scheduler=EULER)[:2] == (steps, scale)


@pytest.mark.parametrize(
    ("class_name", "name", "configs", "expected"),
    [
        ("ChromaPipeline", "lodestones/Chroma1-Flash", {}, (16, 1.0)),
        ("ChromaPipeline", "Chroma1-HD-Flash.safetensors", {}, (16, 1.0)),
        ("ChromaPipeline", "chroma-unlocked-v47-flash-heun-8-steps-cfg-1", {}, (16, 1.0)),
        ("ChromaPipeline", "lodestones/Chroma1-HD", {}, (35, 5.0)),
        ("ChromaPipeline", "lodestones/Chroma1-Base", {}, (35, 5.0)),
        ("ChromaPipeline", "flash/chroma", {}, (35, 5.0)),
        ("ChromaPipeline", "chroma-camera-flash-style", {}, (35, 5.0)),
        ("ChromaPipeline", "chroma1-flashback", {}, (35, 5.0)),
        ("FluxPipeline", "flux-hyper-realism", {"guidance_embeds": True}, (28, 3.5)),
        ("FluxPipeline", "flux-epoch-8-step-100", {"guidance_embeds": True}, (28, 3.5)),
        ("FluxPipeline", "FLUX.1-dev-de-distill", {"guidance_embeds": True}, (28, 3.5)),
        ("StableDiffusion3Pipeline", "sd3-camera-flash", {}, (28, 7.0)),
        ("FluxPipeline", "flux1-dev-schnell-merge", {"guidance_embeds": True}, (4, 3.5)),
        ("FluxPipeline", "FLUX.1-Turbo-Alpha", {"guidance_embeds": True}, (8, 3.5)),
        ("FluxPipeline", "Hyper-FLUX.1-dev-16steps", {"guidance_embeds": True}, (16, 3.5)),
        ("FluxPipeline", "Flux-Fusion-V2-4step-merge", {"guidance_embeds": True}, (4, 3.5)),
        ("FluxPipeline", "FLUX.1-Krea-dev", {"guidance_embeds": True}, (28, 4.5)),
        ("FluxPipeline", "FLUX.1-dev", {"guidance_embeds": True}, (28, 3.5)),
        ("FluxPipeline", "schnell/FLUX.1-dev", {"guidance_embeds": True}, (28, 3.5)),
        ("FluxPipeline", "shuttle-3-diffusion", {"guidance_embeds": False}, (4, 1.0)),
        ("FluxPipeline", "ostris/OpenFLUX.1", {"guidance_embeds": False}, (28, 1.0)),
        ("StableDiffusion3Pipeline", "sd3.5_large_turbo", {"qk_norm": "rms"}, (4, 1.0)),
        ("StableDiffusion3Pipeline", "sd-3.5-large-TurboX", {"qk_norm": "rms"}, (8, 1.0)),
        (
            "StableDiffusion3Pipeline",
            "tensorart/stable-diffusion-3.5-medium-turbo",
            {"qk_norm": "rms", "dual_attention_layers": [0]},
            (8, 1.0),
        ),
        ("StableDiffusion3Pipeline", "flash-sd3", {}, (4, 1.0)),
        ("StableDiffusion3Pipeline", "turbo/stable-diffusion-3", {}, (28, 7.0)),
        ("ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo", {}, (8, 0.0)),
        ("ZImagePipeline", "z_image_turbo_bf16.safetensors", {}, (8, 0.0)),
        ("ZImagePipeline", "ZImageTurboNSFW_43BF16AIO.safetensors", {}, (8, 0.0)),
        ("ZImagePipeline", "Z-Image-Turbo-Art", {}, (8, 0.0)),
        ("ZImagePipeline", "turbo/Z-Image", {}, (28, 4.0)),
        ("ZImagePipeline", "zimageturbo_v10", {}, (8, 0.0)),
        ("FluxPipeline", "fluxturbo", {"guidance_embeds": True}, (8, 3.5)),
        ("ChromaPipeline", "chromaflash-q8_0.gguf", {}, (16, 1.0)),
        ("QwenImagePipeline", "qwenimagelightning-4steps", {}, (4, 1.0)),
        ("QwenImagePipeline", "Qwen-Image-Lightning-4steps-V1.0", {}, (4, 1.0)),
        ("QwenImagePipeline", "Qwen-Image-Distill-Full", {}, (15, 1.0)),
        ("QwenImagePipeline", "Qwen/Qwen-Image-2512", {}, (50, 4.0)),
        ("QwenImagePipeline", "lightning/Qwen-Image", {}, (50, 4.0)),
        ("ErnieImagePipeline", "baidu/ERNIE-Image-Turbo", {}, (8, 1.0)),
        ("ErnieImagePipeline", "turbo/ERNIE-Image", {}, (50, 4.0)),
        ("Krea2Pipeline", "krea/Krea-2-Turbo", {}, (8, 0.0)),
        ("Krea2Pipeline", "krea/Krea-2-Raw", {}, (28, 4.5)),
        ("Lumina2Pipeline", "Lumina-Image-2.0", {}, (30, 4.0)),
    ],
)
def test_transformers_are_known_by_their_configuration_and_own_name(
    class_name: str, name: str, configs: dict[str, Any], expected: tuple[int, float]
) -> None:
    # Qwen-Image's schedule depends on the size, that of its Lightning models does not.
    sizes = {"base_shift": 0.5, "max_shift": 0.9}
    found = defaults(class_name, name, scheduler={**FLOW, **sizes}, transformer=configs)
    assert found[:2] == expected


def test_the_files_are_more_exact_than_a_general_name() -> None:
    trailing = {**EULER, "timestep_spacing": "trailing"}
    assert defaults(SDXL, "photo-turbo", scheduler=trailing)[:2] == (4, 0.0)
    lcm = {"_class_name": "LCMScheduler"}
    assert defaults(SDXL, "photo-turbo", scheduler=lcm)[:2] == (8, 1.5)
    assert defaults(SDXL, "photo-dmd2", scheduler=lcm)[:2] == (4, 0.0)
    schnell = {"guidance_embeds": False}
    assert defaults("FluxPipeline", "flux-hyper", transformer=schnell)[:2] == (4, 1.0)


def test_a_reversed_distillation_is_none_although_the_files_show_one() -> None:
    turbo = {**FLOW, "shift": 3.0}
    assert defaults("ZImagePipeline", "Z-Image-De-Turbo", scheduler=turbo)[:2] == (28, 4.0)
    assert defaults("ZImagePipeline", "photo", scheduler=turbo)[:2] == (8, 0.0)


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("stabilityai/sdxl-turbo", (4, 0.0)),
        ("/root/.cache/huggingface/hub/models--stabilityai--sdxl-turbo/snapshots/1f2e", (4, 0.0)),
        ("/cache/models--a--sdxl-turbo/snapshots/1f2e/unet", (4, 0.0)),
        ("stabilityai/stable-diffusion-xl-base-1.0", PLAIN),
        ("/home/turbo/sdxl", PLAIN),
        (r"C:\lightning\sdxl", PLAIN),
        ("runs/sdxl-lightning/checkpoint-500", PLAIN),
    ],
)
def test_the_origin_of_the_denoiser_counts_and_that_of_other_parts_does_not(
    origin: str, expected: tuple[int, float]
) -> None:
    unet = defaults(SDXL, "photo", scheduler=EULER, unet={"_name_or_path": origin})
    assert unet[:2] == expected
    vae = defaults(SDXL, "photo", scheduler=EULER, vae={"_name_or_path": origin})
    assert vae[:2] == PLAIN


@pytest.mark.parametrize(
    ("name", "own", "scheduler"),
    [
        ("photo-lcm", "PNDMScheduler", "lcm"),
        ("sdxl-dmd2", "EulerDiscreteScheduler", "lcm"),
        ("sdxl-dmd2", "TCDScheduler", "tcd"),
        ("sdxl-tcd", "DDIMScheduler", "tcd"),
        ("photo-lightning", "DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("photo", "PNDMScheduler", "pndm"),
    ],
)
def test_consistency_models_have_a_scheduler_that_fits(name: str, own: str, scheduler: str) -> None:
    assert defaults(SD, name, scheduler={"_class_name": own})[2] == scheduler


def test_a_unet_with_the_guidance_scale_as_an_input_is_a_consistency_model() -> None:
    found = defaults(SDXL, "photo", scheduler=EULER, unet={"time_cond_proj_dim": 256})
    assert found == (8, 8.5, "lcm")


def test_an_edm_model_keeps_its_scheduler_whatever_its_name() -> None:
    edm = {"_class_name": "EDMDPMSolverMultistepScheduler"}
    assert defaults(SDXL, "playground-lcm", scheduler=edm)[2] == "edm_dpmpp_2m"


UNET_SHAPES: dict[str, tuple[int, ...]] = {
    f"{UNET}input_blocks.0.0.weight": (64, 4, 3, 3),
    f"{UNET}input_blocks.1.0.out_layers.3.weight": (64, 64, 3, 3),
    f"{UNET}input_blocks.1.1.proj_in.weight": (64, 64, 1, 1),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (64, 768),
    f"{UNET}output_blocks.0.0.out_layers.3.weight": (64, 64, 3, 3),
    f"{UNET}out.2.weight": (4, 64, 3, 3),
}


@pytest.mark.parametrize(
    ("name", "class_name", "spacing"),
    [
        ("photo", "PNDMScheduler", None),
        ("photo_8LCM", "LCMScheduler", "leading"),
        ("photo-lightning", "EulerDiscreteScheduler", "trailing"),
        ("Hyper-SD15-8steps", "DDIMScheduler", "trailing"),
        ("sd_turbo", "EulerDiscreteScheduler", "trailing"),
        ("sd_turbo_2steps", "EulerDiscreteScheduler", "trailing"),
        ("photo-tcd", "TCDScheduler", "leading"),
        ("lightning-strike-style", "PNDMScheduler", None),
    ],
)
def test_a_single_file_has_the_scheduler_of_its_kind(
    name: str, class_name: str, spacing: str | None
) -> None:
    hints = Hints.of((f"/data/turbo/{name}.safetensors",), {})
    found = describe_unet(UNET_SHAPES, hints, name).files.scheduler
    assert (found["_class_name"], found.get("timestep_spacing")) == (class_name, spacing)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [({}, "sample"), ({"modelspec.prediction_type": "epsilon"}, "epsilon")],
    ids=["derived", "given"],
)
def test_lightning_for_one_step_predicts_the_clean_latents_unless_the_file_has_another_type(
    metadata: dict[str, str], expected: str
) -> None:
    hints = Hints.of(("sdxl_lightning_1step_x0.safetensors",), metadata)
    found = describe_unet(UNET_SHAPES, hints, "the file").files.scheduler
    assert (found["prediction_type"], found["timestep_spacing"]) == (expected, "trailing")


@pytest.mark.parametrize("place", range(len(UNET_DISTILLATIONS)))
def test_the_scheduler_of_a_single_file_is_offered_and_is_the_default(place: int) -> None:
    kind = UNET_DISTILLATIONS[place]
    if not kind.scheduler_config:
        assert not kind.schedulers
        return
    name = own_sampler(kind.scheduler_config)
    assert name in DIFFUSION_SAMPLERS
    assert not kind.schedulers or name == kind.schedulers[0]


@dataclass(frozen=True)
class Downloaded:
    path: Path
    files: ModelFiles


def write_folder(folder: Path, name_or_path: str = "") -> Path:
    (folder / "scheduler").mkdir(parents=True)
    (folder / "unet").mkdir()
    index = {"_class_name": SD, "unet": ["diffusers", "UNet2DConditionModel"]}
    pndm = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
    unet = {"_name_or_path": name_or_path, "sample_size": 64}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "unet" / "config.json").write_text(json.dumps(unet), encoding="utf-8")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(pndm), encoding="utf-8")
    return folder


def write_file(path: Path, title: str = "") -> Path:
    header: dict[str, Any] = {"__metadata__": {"modelspec.title": title}} if title else {}
    end = 0
    clip = {
        f"{CLIP}text_model.embeddings.token_embedding.weight": (8, 8),
        f"{CLIP}text_model.embeddings.position_embedding.weight": (8, 8),
        f"{CLIP}text_model.encoder.layers.0.mlp.fc1.weight": (8, 8),
    }
    for name, shape in (UNET_SHAPES | clip).items():
        start, end = end, end + prod(shape)
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return path


def of_folder(place: Path, name: str) -> ModelSpec:
    return read_model_spec(str(write_folder(place / name)))


def of_link(place: Path, name: str) -> ModelSpec:
    folder = write_folder(place / name)
    (place / "current").symlink_to(folder)
    return read_model_spec(str(place / "current"))


def of_file(place: Path, name: str) -> ModelSpec:
    return read_model_spec(str(write_file(place / f"{name}.safetensors")))


def of_hub_id(place: Path, name: str) -> ModelSpec:
    source = f"turbo/{name}@lightning"
    found = Downloaded(place, ModelFiles.read(write_folder(place / "x"), source))
    return read_model_spec(source, found)


def of_hub_cache(place: Path, name: str) -> ModelSpec:
    folder = place / f"models--turbo--{name}" / "snapshots" / "5b3e"
    return read_model_spec(str(write_folder(folder)))


def of_entry_of_folder(place: Path, name: str) -> ModelSpec:
    folder = write_folder(place / "x")
    return read_model_spec(str(folder), defaults=ModelDefaults(model_name=f"turbo/{name}"))


def of_entry_of_file(place: Path, name: str) -> ModelSpec:
    file = write_file(place / "x.safetensors")
    return read_model_spec(str(file), defaults=ModelDefaults(model_name=name))


def of_toml(place: Path, name: str) -> ModelSpec:
    folder = write_folder(place / "x")
    (folder / "img2img.toml").write_text(f"name = '{name}'", encoding="utf-8")
    return read_model_spec(str(folder))


def of_toml_of_file(place: Path, name: str) -> ModelSpec:
    file = write_file(place / "x.safetensors")
    file.with_suffix(".toml").write_text(f"name = '{name}'", encoding="utf-8")
    return read_model_spec(str(file))


def of_title(place: Path, name: str) -> ModelSpec:
    return read_model_spec(str(write_file(place / "x.safetensors", name)))


def of_origin(place: Path, name: str) -> ModelSpec:
    return read_model_spec(str(write_folder(place / "x", f"turbo/{name}")))


def of_gguf_file(place: Path, name: str) -> ModelSpec:
    folder, file = write_folder(place / "x"), place / f"{name}-Q4_K_M.gguf"
    return read_model_spec(str(folder), defaults=ModelDefaults(gguf_file=file))


FORMS = {
    function.__name__.removeprefix("of_"): function
    for function in (
        *(of_folder, of_link, of_file, of_hub_id, of_hub_cache, of_entry_of_folder),
        *(of_entry_of_file, of_toml, of_toml_of_file, of_title, of_origin, of_gguf_file),
    )
}


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize(
    ("name", "steps", "scale", "scheduler"),
    [
        ("dreamshaper", 20, 7.5, "pndm"),
        ("dreamshaper-lcm", 8, 1.5, "lcm"),
        ("sd15-lightning-4step", 4, 0.0, None),
        ("Hyper-SD15-8steps-CFG", 8, 5.0, None),
        ("sd15-dmd2", 4, 0.0, "lcm"),
        ("lightning-strike-style", 20, 7.5, "pndm"),
        ("sd15-de-turbo", 20, 7.5, "pndm"),
    ],
)
def test_every_form_of_a_model_has_the_same_defaults(
    form: str, name: str, steps: int, scale: float, scheduler: str | None, tmp_path: Path
) -> None:
    # The folders above the model are named as kinds of distillation.
    info = FORMS[form](tmp_path / "sdxl-lightning" / "turbo", name).info

    found = info.default_num_inference_steps, info.default_guidance_scale
    assert found == (steps, scale)
    if scheduler:
        assert info.schedulers[0] == scheduler


@pytest.mark.parametrize("write", [write_folder, write_file], ids=["folder", "file"])
@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("photo", {}),
        ("photo-lcm", {}),
        ("photo", {"model_name": "photo-lightning-2step"}),
        ("photo", {"gguf_file": Path("/data/turbo/photo-dmd2-Q4_0.gguf")}),
        ("photo-lcm", {"gguf_file": Path("photo-de-lcm.gguf")}),
    ],
    ids=["plain", "own", "entry", "gguf", "reversed"],
)
def test_the_loaded_model_has_the_defaults_that_its_settings_announce(
    write: Callable[[Path], Path], file: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    suffix = ".safetensors" if write is write_file else ""
    source = str(write(tmp_path / f"{file}{suffix}"))
    found = find_model(source, **settings)
    loaded = found.family.traits(found.files)
    spec = read_model_spec(source, defaults=ModelDefaults(**settings))

    assert loaded.num_inference_steps == spec.num_inference_steps
    assert (loaded.guidance_scale, loaded.scheduler) == (spec.guidance_scale, spec.scheduler)
    is_plain = "de-lcm" in str(settings) or (not settings and file == "photo")
    assert (spec.num_inference_steps == 20) == is_plain


def test_the_operator_replaces_each_default(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "sd15-lcm"))
    own = ModelDefaults(default_num_inference_steps=6, default_scheduler="euler")
    spec = read_model_spec(folder, defaults=own)
    assert (spec.num_inference_steps, spec.guidance_scale, spec.scheduler) == (6, 1.5, "euler")
    spec = read_model_spec(folder, defaults=ModelDefaults(default_guidance_scale=0.0))
    assert (spec.num_inference_steps, spec.guidance_scale) == (8, 0.0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("SDTurbo", "-sd-turbo-"),
        ("v21TurboDPMSDE", "-v21-turbo-dpmsde-"),
        ("XLLightning4step_v2", "-xl-lightning-4step-v2-"),
        ("sd_xl_turbo_1.0_fp16.safetensors", "-sd-xl-turbo-1-0-fp16-"),
        ("/data/turbo/", "-turbo-"),
        ("owner/name@turbo", "-name-"),
        ("~/x/Ünet Turbo", "-ünet-turbo-"),
        ("/", "--"),
    ],
)
def test_a_name_has_whole_words(source: str, words: str) -> None:
    assert ModelName.of(source).words == words


FIELDS = {"time_cond_proj_dim", "guidance_embeds", "is_distilled", "4", "8", "16", "step"}


def rows_of_the_page() -> Iterator[tuple[str, str, int, float, str]]:
    """Yields family, word, steps, guidance scale and scheduler of the table in docs/models.md."""
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    table = page.partition("\n## Distilled models\n")[2].partition("\n## ")[0]
    family = ""
    for line in table.splitlines():
        if not line.startswith("| ") or line.startswith(("| family", "| ---")):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        family = cells[0].partition("`")[2].partition("`")[0] or family
        if "in a Medium model" in cells[2]:
            cells[2] = cells[2].partition(",")[2]  # That word has the row of Large.
        for word in sorted(set(re.findall(r"`([^`]+)`", cells[2])) - FIELDS):
            steps, scale = (re.match(r"[\d.]+", cell) for cell in cells[3:5])
            assert steps
            assert scale
            yield family, word, int(steps[0]), float(scale[0]), cells[5].strip("`")


def test_each_word_of_the_page_has_the_defaults_of_its_row() -> None:
    classes = {family.name: next(iter(family.pipelines)) for family in families()}
    rows = list(rows_of_the_page())
    assert len(rows) > 25
    for family, word, steps, scale, scheduler in rows:
        configs = {"transformer": {"guidance_embeds": True}} if family == "flux" else {}
        found = defaults(classes[family], word, **configs)
        assert found[:2] == (steps, scale), (family, word)
        assert scheduler in ("own", found[2]), (family, word)
