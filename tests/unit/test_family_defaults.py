"""Defaults and errors of the model families, by the JSON files of a model only."""

from __future__ import annotations

from typing import Any

import pytest

from img2img_server.domain.models import Guidance
from img2img_server.domain.strength import StrengthRule
from img2img_server.engine.denoiser import TextInput
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.family import ModelError, ModelFiles, ModelTraits


def traits(class_name: str, **configs: dict[str, Any]) -> ModelTraits:
    files = ModelFiles({"_class_name": class_name}, configs)
    return detect(files, "the model").traits(files)


FLUX = {"in_channels": 64, "out_channels": None}


def test_flux_dev_takes_the_guidance_scale_as_an_input() -> None:
    found = traits("FluxPipeline", transformer={**FLUX, "guidance_embeds": True})

    assert (found.family, found.guidance) == ("flux", Guidance.EMBEDDED)
    assert (found.num_inference_steps, found.guidance_scale) == (28, 3.5)
    assert (found.native_size, found.side_multiple) == (1024, 16)


def test_flux_schnell_runs_four_steps_without_guidance() -> None:
    found = traits("FluxPipeline", transformer={**FLUX, "guidance_embeds": False})

    assert (found.guidance, found.num_inference_steps) == (Guidance.NONE, 4)
    assert found.takes_negative_prompt, "with true_cfg_scale"


@pytest.mark.parametrize(
    ("config", "steps", "scale"),
    [
        ({}, 28, 7.0),
        ({"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]}, 40, 4.5),
        ({"qk_norm": "rms_norm", "dual_attention_layers": []}, 28, 3.5),
    ],
    ids=["3", "3.5 medium", "3.5 large"],
)
def test_stable_diffusion_3_has_the_defaults_of_its_size(
    config: dict[str, Any], steps: int, scale: float
) -> None:
    found = traits("StableDiffusion3Pipeline", transformer=config)

    assert (found.family, found.guidance) == ("sd3", Guidance.CLASSIFIER_FREE)
    assert (found.num_inference_steps, found.guidance_scale) == (steps, scale)
    assert (found.side_multiple, found.max_side) == (16, 2048)


def test_sides_do_not_exceed_the_positions_that_the_model_knows() -> None:
    config = {"pos_embed_max_size": 64}
    assert traits("StableDiffusion3Pipeline", transformer=config).max_side == 1024


@pytest.mark.parametrize(
    ("name", "steps"), [("stable-diffusion-3.5-large-turbo", 4), ("sd3.5_medium_turbo_8steps", 8)]
)
def test_stable_diffusion_3_turbo_is_known_by_its_name(name: str, steps: int) -> None:
    index, config = {"_class_name": "StableDiffusion3Pipeline"}, {"qk_norm": "rms_norm"}
    files = ModelFiles(index, {"transformer": config}, (name,))
    found = detect(files, name).traits(files)

    assert (found.num_inference_steps, found.guidance_scale) == (steps, 1.0)


def test_chroma_has_classifier_free_guidance() -> None:
    found = traits("ChromaPipeline", transformer=FLUX)

    assert (found.family, found.guidance) == ("chroma", Guidance.CLASSIFIER_FREE)
    assert (found.num_inference_steps, found.guidance_scale) == (35, 5.0)


def test_a_flux_model_with_a_control_image_is_refused() -> None:
    config = {"in_channels": 384, "out_channels": 64, "guidance_embeds": True}
    with pytest.raises(ModelError, match="384 input channels instead of 64"):
        traits("FluxPipeline", transformer=config)


@pytest.mark.parametrize(
    ("shift", "name", "steps", "scale"),
    [(6.0, "", 28, 4.0), (3.0, "", 8, 0.0), (6.0, "owner/Z-Image-Turbo", 8, 0.0)],
)
def test_z_image_turbo_is_known_by_its_shift_or_its_name(
    shift: float, name: str, steps: int, scale: float
) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    found = traits("ZImagePipeline", scheduler=flow, transformer={"_name_or_path": name})

    assert (found.num_inference_steps, found.guidance_scale) == (steps, scale)
    assert found.guidance is Guidance.CLASSIFIER_FREE_FROM_ZERO


def test_z_image_omni_is_refused() -> None:
    with pytest.raises(ModelError, match="images as conditions"):
        traits("ZImagePipeline", transformer={"siglip_feat_dim": 1152})


def test_z_image_shares_forwards_up_to_twice_the_tokens() -> None:
    family = detect(ModelFiles({"_class_name": "ZImagePipeline"}), "the model")

    def key(height: int, width: int) -> object:
        text = TextInput(
            prompt="", negative_prompt="", guidance_scale=0.0, height=height, width=width
        )
        return family.batch_key(text)

    assert key(1024, 1024) == key(768, 1280) != key(512, 512) == key(512, 384)


@pytest.mark.parametrize(
    ("shifts", "steps", "scale"),
    [
        ({"base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}, 50, 4.0),
        ({"base_shift": 1.0986, "max_shift": 1.0986, "shift_terminal": None}, 8, 1.0),
    ],
)
def test_qwen_image_lightning_is_known_by_its_fixed_shift(
    shifts: dict[str, Any], steps: int, scale: float
) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", **shifts}
    found = traits("QwenImagePipeline", scheduler=flow)

    assert (found.num_inference_steps, found.guidance_scale) == (steps, scale)
    assert (found.native_size, found.guidance) == (1328, Guidance.CLASSIFIER_FREE)


def test_qwen_image_lightning_has_the_steps_of_its_name() -> None:
    index = {"_class_name": "QwenImagePipeline"}
    files = ModelFiles(index, {}, ("Qwen-Image-Lightning-4steps",))
    found = detect(files, "the model").traits(files)

    assert (found.num_inference_steps, found.guidance_scale) == (4, 1.0)


def test_edit_models_of_qwen_image_are_refused() -> None:
    with pytest.raises(ModelError, match="QwenImageEditPipeline, which is not served"):
        traits("QwenImageEditPipeline")


def test_sana_sprint_runs_four_steps_of_its_own_scheduler() -> None:
    found = traits("SanaSprintPipeline", scheduler={"_class_name": "SCMScheduler"})

    assert (found.scheduler, found.schedulers, found.num_inference_steps) == ("scm", ("scm",), 4)
    assert (found.guidance, found.side_multiple) == (Guidance.EMBEDDED, 32)


def test_other_flow_families_do_not_offer_the_scheduler_of_sana_sprint() -> None:
    with pytest.raises(ModelError, match="scheduler SCMScheduler is not offered"):
        traits("ZImagePipeline", scheduler={"_class_name": "SCMScheduler"})


def test_lumina_2_runs_thirty_steps() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0}
    found = traits("Lumina2Pipeline", scheduler=flow)

    assert (found.family, found.num_inference_steps, found.guidance_scale) == ("lumina2", 30, 4.0)


def test_kolors_runs_fifty_steps_and_rounds_down() -> None:
    found = traits("KolorsPipeline", scheduler={"_class_name": "EulerDiscreteScheduler"})

    assert (found.family, found.scheduler, found.num_inference_steps) == ("kolors", "euler", 50)
    assert (found.guidance_scale, found.strength_rule) == (5.0, StrengthRule.FLOOR)
    assert (found.native_size, found.side_multiple) == (1024, 8)


EULER = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
TRAILING = {**EULER, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("name", "scheduler", "steps", "scale"),
    [
        (
            "stabilityai/sdxl-turbo",
            {**TRAILING, "_class_name": "EulerAncestralDiscreteScheduler"},
            4,
            0.0,
        ),
        ("distilled", TRAILING, 4, 0.0),
        ("ByteDance/SDXL-Lightning-4step", TRAILING, 4, 0.0),
        ("sdxl_lightning_4step", TRAILING, 4, 0.0),
        ("sdxl_lightning_2step_unet", TRAILING, 2, 0.0),
        ("Hyper-SDXL-1step-Unet", TRAILING, 1, 0.0),
        ("Hyper_SDXL_1step", TRAILING, 1, 0.0),
        ("RealVisXL_Lightning", {"_class_name": "DPMSolverMultistepScheduler"}, 8, 0.0),
        ("DreamShaper-XL-Turbo", {"_class_name": "DPMSolverMultistepScheduler"}, 8, 2.0),
        ("DreamShaper-LCM", {"_class_name": "LCMScheduler"}, 8, 1.5),
        ("tcd", {"_class_name": "TCDScheduler"}, 8, 0.0),
        ("playground-v2.5", {"_class_name": "EDMDPMSolverMultistepScheduler"}, 20, 3.0),
        ("sdxl-base", EULER, 20, 7.5),
        ("runs/lightning_logs/version_3", EULER, 20, 7.5),
        ("pytorch-lightning/sdxl-tuned", EULER, 20, 7.5),
        (
            "noobai-v-pred",
            {**TRAILING, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            20,
            7.5,
        ),
    ],
)
def test_relatives_of_sdxl_have_defaults_by_their_scheduler_and_name(
    name: str, scheduler: dict[str, Any], steps: int, scale: float
) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline"}
    files = ModelFiles(index, {"scheduler": scheduler, "unet": {"sample_size": 64}}, (name,))
    found = detect(files, name).traits(files)
    assert (found.num_inference_steps, found.guidance_scale) == (steps, scale)
    assert found.native_size == 512


def test_a_latent_consistency_model_has_the_defaults_of_its_pipeline() -> None:
    found = traits("LatentConsistencyModelPipeline", scheduler={"_class_name": "LCMScheduler"})
    assert (found.family, found.num_inference_steps, found.guidance_scale) == ("lcm", 4, 8.5)
    assert (found.schedulers, found.strength_rule) == (("lcm",), "all")
