"""Folders of models that are whole but of another kind, or have parts that do not fit together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

from tests.doctor_forms.forms import (
    AGAIN,
    CORRECT,
    SERVE,
    TEXT,
    UNET,
    VAE,
    Builder,
    Settings,
    advice,
    broken,
    change_tensors,
    edit,
)
from tests.tiny_flow import autoencoder
from tests.tiny_models import clip_tokenizer, text_config, unet_options

OTHER = advice(
    "serve", "use", "choose", "name", "set", "download", "fetch", "convert", "export", "take"
)


def _with_unet(builder: Builder, class_name: str, **changes: Any) -> Path:
    model = builder.sd()
    shutil.rmtree(model / "unet")
    UNet2DConditionModel(**unet_options(cross_attention_dim=16, **changes)).save_pretrained(
        model / "unet"
    )
    edit(model / "model_index.json", _class_name=class_name)
    return model


@broken("inpaint", advice=OTHER)
def inpainting_model(builder: Builder) -> Settings:
    return {"MODEL": _with_unet(builder, "StableDiffusionInpaintPipeline", in_channels=9)}


@broken("9|nine", "channels", advice=OTHER)
def unet_for_inpainting_under_the_usual_class(builder: Builder) -> Settings:
    return {"MODEL": _with_unet(builder, "StableDiffusionPipeline", in_channels=9)}


@broken("StableDiffusionInstructPix2PixPipeline|8|eight", advice=OTHER)
def instruct_pix2pix_model(builder: Builder) -> Settings:
    return {"MODEL": _with_unet(builder, "StableDiffusionInstructPix2PixPipeline", in_channels=8)}


@broken("StableDiffusionDepth2ImgPipeline|depth", advice=OTHER)
def depth_model(builder: Builder) -> Settings:
    return {"MODEL": _with_unet(builder, "StableDiffusionDepth2ImgPipeline", in_channels=5)}


@broken("StableDiffusionUpscalePipeline|upscal", advice=OTHER)
def upscaler_model(builder: Builder) -> Settings:
    model = _with_unet(builder, "StableDiffusionUpscalePipeline", in_channels=7)
    shutil.copytree(model / "scheduler", model / "low_res_scheduler")
    edit(model / "model_index.json", low_res_scheduler=["diffusers", "DDPMScheduler"])
    return {"MODEL": model}


@broken("refiner", advice=OTHER)
def sdxl_refiner(builder: Builder) -> Settings:
    model = builder.sdxl()
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(model / part)
    edit(
        model / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=[None, None],
        tokenizer=[None, None],
        requires_aesthetics_score=True,
    )
    return {"MODEL": model}


@broken("StableVideoDiffusionPipeline", advice=OTHER)
def video_model(builder: Builder) -> Settings:
    model = builder.sd()
    edit(
        model / "model_index.json",
        _class_name="StableVideoDiffusionPipeline",
        unet=["diffusers", "UNetSpatioTemporalConditionModel"],
        vae=["diffusers", "AutoencoderKLTemporalDecoder"],
    )
    return {"MODEL": model}


@broken("WanPipeline", advice=OTHER)
def video_model_with_a_transformer(builder: Builder) -> Settings:
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    builder.json("wan/model_index.json", index)
    return {"MODEL": builder.folder / "wan"}


@broken("ControlNet", advice=OTHER)
def controlnet_folder(builder: Builder) -> Settings:
    builder.json("canny/config.json", {"_class_name": "ControlNetModel", "cross_attention_dim": 16})
    builder.tensors(
        "canny/diffusion_pytorch_model.safetensors",
        {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    )
    return {"MODEL": builder.folder / "canny"}


@broken("LlamaForCausalLM|language model|transformers", advice=OTHER)
def language_model(builder: Builder) -> Settings:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    builder.json("llama/config.json", config)
    builder.tensors("llama/model.safetensors", {"model.embed_tokens.weight": (8, 64)})
    return {"MODEL": builder.folder / "llama"}


@broken("StableDifusionPipeline", advice=CORRECT + "|" + OTHER)
def misspelt_pipeline_class(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "model_index.json", _class_name="StableDifusionPipeline")
    return {"MODEL": model}


@broken("model_index.json", "_class_name", advice=CORRECT + "|" + AGAIN)
def index_without_a_class(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "model_index.json", _class_name=None)
    return {"MODEL": model}


@broken("model_index.json", "list|object", advice=CORRECT + "|" + AGAIN)
def index_that_is_a_list(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "model_index.json").write_text('["StableDiffusionPipeline"]')
    return {"MODEL": model}


@broken("model_index.json", "unet", advice=CORRECT + "|" + AGAIN)
def index_with_a_part_that_is_no_pair(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "model_index.json", unet="UNet2DConditionModel")
    return {"MODEL": model}


@broken("unet", "UNet9DModel", advice=CORRECT + "|" + OTHER + "|" + AGAIN)
def unet_of_an_unknown_class(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "model_index.json", unet=["diffusers", "UNet9DModel"])
    return {"MODEL": model}


@broken("my_pipeline", advice=OTHER + "|" + CORRECT)
def pipeline_with_code_of_its_own(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "model_index.json", _class_name=["my_pipeline", "MyPipeline"])
    (model / "my_pipeline.py").write_text("raise SystemExit(99)\n")
    return {"MODEL": model}


@broken("ONNX", advice=OTHER)
def onnx_folder(builder: Builder) -> Settings:
    model = builder.sd()
    for part in ("unet", "text_encoder"):
        shutil.rmtree(model / part)
        builder.bytes(f"model/{part}/model.onnx", b"\x08\x07\x12\x07pytorch" + bytes(100))
    edit(
        model / "model_index.json",
        _class_name="OnnxStableDiffusionPipeline",
        unet=["diffusers", "OnnxRuntimeModel"],
    )
    return {"MODEL": model}


@broken("OpenVINO", advice=OTHER)
def openvino_folder(builder: Builder) -> Settings:
    model = builder.sd()
    for part in ("unet", "text_encoder", "vae"):
        shutil.rmtree(model / part)
        builder.bytes(f"model/{part}/openvino_model.xml", b'<?xml version="1.0"?><net/>')
        builder.bytes(f"model/{part}/openvino_model.bin", bytes(100))
    return {"MODEL": model}


@broken("Core ML", advice=OTHER)
def core_ml_folder(builder: Builder) -> Settings:
    for name in ("Unet", "TextEncoder", "VAEDecoder"):
        builder.bytes(f"coreml/{name}.mlmodelc/model.mil", b"program(1.0)")
        builder.json(f"coreml/{name}.mlmodelc/metadata.json", [])
    return {"MODEL": builder.folder / "coreml"}


@broken("unet", "flax", advice=OTHER)
def flax_folder(builder: Builder) -> Settings:
    model = builder.sd()
    for part in ("unet", "vae"):
        (model / part / "diffusion_pytorch_model.safetensors").unlink()
        builder.bytes(f"model/{part}/diffusion_flax_model.msgpack", bytes(100))
    return {"MODEL": model}


@broken("unet", "gguf", "IMG2IMG_GGUF_FILE", advice=SERVE)
def gguf_in_the_folder_of_a_part(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).unlink()
    builder.bytes("model/unet/unet-Q4_K_M.gguf", b"GGUF\x03\0\0\0" + bytes(100))
    return {"MODEL": model}


@broken("unet", "bitsandbytes|quanti", advice=OTHER)
def quantised_by_bitsandbytes(builder: Builder) -> Settings:
    model = builder.sd()
    edit(
        model / "unet/config.json",
        quantization_config={
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        },
    )

    def quantise(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        linear = [key for key, it in found.items() if it.ndim == 2]
        for key in linear:
            size = found[key].numel()
            found[key] = torch.zeros(size // 2, 1, dtype=torch.uint8)
            found[f"{key}.absmax"] = torch.ones(max(1, size // 64))
            found[f"{key}.quant_map"] = torch.linspace(-1, 1, 16)
            found[f"{key}.quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
        return found

    change_tensors(model / UNET, quantise)
    return {"MODEL": model}


@broken(UNET, "shape|size|does not fit|of another|config", advice=AGAIN)
def unet_weights_of_sdxl(builder: Builder) -> Settings:
    model = builder.sd()
    shutil.copy(builder.stock.sdxl / UNET, model / UNET)
    return {"MODEL": model}


@broken(VAE, "of another|lacks|missing|not|config", advice=AGAIN)
def text_encoder_weights_in_the_autoencoder(builder: Builder) -> Settings:
    model = builder.sd()
    shutil.copy(model / TEXT, model / VAE)
    return {"MODEL": model}


@broken("text_encoder", "32", "16", advice=OTHER + "|" + AGAIN)
def text_encoder_of_another_width(builder: Builder) -> Settings:
    model = builder.sd()
    config = text_config(clip_tokenizer(builder.folder / "words"))
    config.hidden_size = 32
    CLIPTextModel(config).save_pretrained(model / "text_encoder")
    return {"MODEL": model}


@broken("vae", "16", r"\b4\b", "channels", advice=OTHER + "|" + AGAIN)
def autoencoder_of_flux(builder: Builder) -> Settings:
    model = builder.sd()
    shutil.rmtree(model / "vae")
    autoencoder().save_pretrained(model / "vae")
    return {"MODEL": model}


@broken("tokenizer", "empty|missing|vocab|no files", advice=AGAIN)
def empty_tokenizer_folder(builder: Builder) -> Settings:
    model = builder.sd()
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    return {"MODEL": model}


@broken(
    "tokenizer/vocab.json|tokenizer/tokenizer.json",
    "empty|no tokens|no words|knows [02] tokens",
    advice=AGAIN,
)
def tokenizer_with_an_empty_vocabulary(builder: Builder) -> Settings:
    model = builder.sd()
    for file in (model / "tokenizer").iterdir():
        if file.name in ("vocab.json", "tokenizer.json"):
            file.unlink()
    (model / "tokenizer/vocab.json").write_text("{}")
    (model / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    return {"MODEL": model}


@broken("tokenizer/merges.txt", "missing|no|lacks", advice=AGAIN)
def tokenizer_without_merges(builder: Builder) -> Settings:
    model = builder.sd()
    words = builder.folder / "words"
    clip_tokenizer(words)
    for file in (model / "tokenizer").glob("tokenizer.json"):
        file.unlink()
    shutil.copy(words / "vocab.json", model / "tokenizer/vocab.json")
    (model / "tokenizer/merges.txt").unlink(missing_ok=True)
    return {"MODEL": model}


@broken("tokenizer", "vocabulary|tokens|54", advice=AGAIN + "|" + OTHER)
def tokenizer_of_a_larger_model(builder: Builder) -> Settings:
    model = builder.sd()
    for file in (model / "tokenizer").glob("tokenizer.json"):
        file.unlink()
    words = builder.folder / "words"
    clip_tokenizer(words)
    vocabulary = json.loads((words / "vocab.json").read_text(encoding="utf-8"))
    vocabulary.update({f"word{number}</w>": len(vocabulary) + number for number in range(200)})
    (model / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    shutil.copy(words / "merges.txt", model / "tokenizer/merges.txt")
    return {"MODEL": model}


@broken("KDPM2DiscreteScheduler", "euler", advice=SERVE)
def scheduler_that_is_not_offered(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "model_index.json", scheduler=["diffusers", "KDPM2DiscreteScheduler"])
    edit(model / "scheduler/scheduler_config.json", _class_name="KDPM2DiscreteScheduler")
    return {"MODEL": model}


@broken("EulerDiscretScheduler", advice=SERVE + "|" + CORRECT)
def misspelt_scheduler(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "model_index.json", scheduler=["diffusers", "EulerDiscretScheduler"])
    edit(model / "scheduler/scheduler_config.json", _class_name="EulerDiscretScheduler")
    return {"MODEL": model}


@broken("scheduler_config.json", "prediction_type", "vprediction", advice=SERVE + "|" + CORRECT)
def misspelt_prediction_type(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "scheduler/scheduler_config.json", prediction_type="vprediction")
    return {"MODEL": model}


@broken("scheduler_config.json", "beta", advice=SERVE + "|" + CORRECT)
def scheduler_with_text_for_a_number(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "scheduler/scheduler_config.json", beta_start="0.00085")
    return {"MODEL": model}


@broken("img2img.toml", "steps", advice=CORRECT)
def misspelt_entry_of_the_defaults(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "img2img.toml").write_text("[defaults]\nsteps = 8\n")
    return {"MODEL": model}


@broken("img2img.toml", r"line \d", advice=CORRECT)
def defaults_that_are_no_toml(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "img2img.toml").write_text("[defaults]\nnum_inference_steps: 8\n")
    return {"MODEL": model}


@broken("diffusion_pytorch_model.bin", "IMG2IMG_ALLOW_PICKLES", advice=SERVE)
def pickles_only(builder: Builder) -> Settings:
    model = builder.sd()
    torch.save(load_file(model / UNET), model / "unet/diffusion_pytorch_model.bin")
    (model / UNET).unlink()
    return {"MODEL": model}
