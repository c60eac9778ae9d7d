"""Reading a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from img2img_server.domain.models import ModelInfo
from img2img_server.engine.diffusers.samplers import DIFFUSION_SAMPLERS
from img2img_server.engine.family import ModelError
from img2img_server.engine.model_spec import ModelDefaults, ModelSpec, read_model_spec


def write_model(folder: Path, toml: str = "", **files: dict[str, object]) -> Path:
    files = {"model_index": {"_class_name": "StableDiffusionPipeline"}, **files}
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    if toml:
        (folder / "img2img.toml").write_text(toml, encoding="utf-8")
    return folder


def test_a_plain_diffusers_directory_is_described_by_its_own_files(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path / "plain",
        model_index={"_class_name": "StableDiffusionXLPipeline"},
        scheduler__scheduler_config={"_class_name": "EulerAncestralDiscreteScheduler"},
        unet__config={"sample_size": 128},
    )

    assert read_model_spec(str(folder)) == ModelSpec(
        takes_prompt_weights=True,
        source=str(folder),
        name="plain",
        family="sdxl",
        scheduler="euler_a",
        num_inference_steps=20,
        guidance_scale=7.5,
        strength=0.7,
        max_num_inference_steps=100,
        native_size=1024,
        multiple=8,
        max_side=2048,
        scheduler_max_steps=(("lcm", 50), ("tcd", 50)),
    )


def test_a_scheduler_that_is_not_offered_is_refused_with_its_name_and_those_that_are(
    tmp_path: Path,
) -> None:
    config = {"_class_name": "KDPM2DiscreteScheduler"}
    folder = write_model(tmp_path, scheduler__scheduler_config=config)

    sentence = r"scheduler KDPM2DiscreteScheduler is not offered. Choose one of ddim, .*pndm"
    with pytest.raises(ModelError, match=sentence):
        read_model_spec(str(folder))
    (folder / "img2img.toml").write_text("[defaults]\nscheduler = 'euler'", encoding="utf-8")
    assert read_model_spec(str(folder)).scheduler == "euler"


def test_a_variant_that_is_not_offered_is_refused_and_not_replaced(tmp_path: Path) -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}
    folder = write_model(tmp_path, scheduler__scheduler_config=config)

    with pytest.raises(ModelError, match=r"Scheduler \(algorithm_type dpmsolver\) is not offered"):
        read_model_spec(str(folder))


def test_an_edm_model_offers_edm_schedulers_only(tmp_path: Path) -> None:
    config = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0}
    folder = write_model(tmp_path, scheduler__scheduler_config=config)

    spec = read_model_spec(str(folder))
    assert (spec.scheduler, spec.schedulers) == ("edm_dpmpp_2m", ("edm_dpmpp_2m", "edm_euler"))


def test_the_scheduler_of_stable_diffusion_as_published_is_served(tmp_path: Path) -> None:
    folder = write_model(tmp_path, scheduler__scheduler_config={"_class_name": "PNDMScheduler"})

    assert read_model_spec(str(folder)).scheduler == "pndm"


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "StableDiffusionUpscalePipeline", ""])
def test_a_model_of_no_family_is_refused_with_its_class(tmp_path: Path, name: str) -> None:
    why = f"pipeline {name}, which is not served" if name else "names no pipeline: its model_index"
    with pytest.raises(ModelError, match=why):
        read_model_spec(str(write_model(tmp_path, model_index={"_class_name": name})))


@pytest.mark.parametrize("channels", [8, 9])
def test_a_unet_that_takes_more_than_the_image_is_refused(tmp_path: Path, channels: int) -> None:
    folder = write_model(tmp_path, unet__config={"in_channels": channels})

    with pytest.raises(ModelError, match=f"UNet has {channels} input channels instead of 4"):
        read_model_spec(str(folder))


def test_the_refiner_of_sdxl_is_refused_by_name(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "requires_aesthetics_score": True,
    }
    with pytest.raises(ModelError, match="the SDXL refiner is not served"):
        read_model_spec(str(write_model(tmp_path, model_index=index)))


def test_a_model_with_the_second_text_encoder_of_sdxl_only_is_the_refiner(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline", "text_encoder": [None, None]}
    with pytest.raises(ModelError, match="the SDXL refiner is not served"):
        read_model_spec(str(write_model(tmp_path, model_index=index)))


def test_a_divisor_of_sides_in_the_toml_cannot_be_less_than_the_familys(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "[sizes]\nmultiple = 12")
    assert read_model_spec(str(folder)).multiple == 24


def test_a_flow_matching_model_takes_the_name_that_user_interfaces_have(tmp_path: Path) -> None:
    folder = write_model(
        tmp_path,
        "[defaults]\nscheduler = 'Euler'",
        model_index={"_class_name": "Lumina2Pipeline"},
    )
    assert read_model_spec(str(folder)).scheduler == "flow_match_euler"


def test_the_toml_wins_over_what_is_found(tmp_path: Path) -> None:
    toml = """
        name = "atelier"
        family = "sd-turbo"
        description = "Restyles photos."
        [defaults]
        scheduler = "lcm"
        num_inference_steps = 4
        guidance_scale = 1.5
        strength = 0.55
        [limits]
        max_num_inference_steps = 50
        [sizes]
        native = 384
        multiple = 16
    """
    folder = write_model(tmp_path, toml)
    spec = read_model_spec(str(folder))

    assert spec.info == ModelInfo(
        name="atelier",
        takes_prompt_weights=True,
        family="sd-turbo",
        schedulers=("lcm", *(name for name in DIFFUSION_SAMPLERS if name != "lcm")),
        default_num_inference_steps=4,
        default_guidance_scale=1.5,
        default_strength=0.55,
        native_size=384,
        max_num_inference_steps=50,
        side_multiple=16,
        max_side_pixels=1024,
        scheduler_max_steps=(("lcm", 50), ("tcd", 50)),
    )
    assert spec.multiple == 16


def test_a_hub_id_is_passed_on(tmp_path: Path) -> None:
    spec = read_model_spec("stabilityai/sd-turbo")

    assert (spec.source, spec.name) == ("stabilityai/sd-turbo", "stabilityai/sd-turbo")


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("name = ", "is no TOML"),
        ("colour = 1", "colour: there is no such entry; there are name, family"),
        (
            "[defaults]\nguidance_scale = 31",
            "defaults.guidance_scale: must be less than or equal to 30",
        ),
        ("[defaults]\nstrength = 2", "defaults.strength: must be less than or equal to 1"),
        ("[defaults]\nscheduler = 'kdpm2'", "scheduler 'kdpm2' of .* is not one of ddim, euler,"),
    ],
)
def test_a_wrong_toml_is_refused_with_its_fault(tmp_path: Path, toml: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        read_model_spec(str(write_model(tmp_path, toml)))


def test_a_folder_without_model_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no model_index\.json"):
        read_model_spec(str(tmp_path))


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model at"):
        read_model_spec(str(tmp_path / "missing"))


def test_the_operators_defaults_win_over_those_of_the_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "[defaults]\nnum_inference_steps = 30\nstrength = 0.4")
    defaults = ModelDefaults(
        default_scheduler="DPM++ 2M Karras", default_guidance_scale=0.0, native_size=640
    )
    spec = read_model_spec(str(folder), defaults=defaults)

    assert (spec.scheduler, spec.guidance_scale) == ("dpmpp_2m_karras", 0.0)
    assert (spec.num_inference_steps, spec.strength, spec.native_size) == (30, 0.4, 640)
    few = ModelDefaults(default_num_inference_steps=4, default_strength=0.0)
    spec = read_model_spec(str(folder), defaults=few)
    assert (spec.num_inference_steps, spec.strength) == (4, 0.0)
