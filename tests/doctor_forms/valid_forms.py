"""Forms with which nothing is wrong, although they look unusual."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.doctor_forms.forms import TEXT, UNET, VAE, Builder, Settings, edit, lora, valid


@valid
def missing_safety_checker_that_is_not_used(builder: Builder) -> Settings:
    model = builder.sd()
    edit(
        model / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    return {"MODEL": model}


@valid
def spaces_and_other_letters_in_paths(builder: Builder) -> Settings:
    builder.tensors("Modèles 模型/стили/naïve style.safetensors", lora(16))
    return {
        "MODEL": builder.sd("Modèles 模型/stable diffusion ñ"),
        "LORA_DIR": builder.folder / "Modèles 模型/стили",
    }


@valid
def only_a_variant_of_fp16(builder: Builder) -> Settings:
    model = builder.sd()
    for file in (model / UNET, model / VAE, model / TEXT):
        half = {key: it.half() for key, it in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    return {"MODEL": model}


@valid
def snapshot_of_the_hub_cache(builder: Builder) -> Settings:
    outer = builder.folder / "models--acme--painter"
    model = builder.sd("models--acme--painter/snapshots/0123456789abcdef")
    (outer / "blobs").mkdir()
    for number, file in enumerate(sorted(it for it in model.rglob("*") if it.is_file())):
        blob = outer / "blobs" / f"{number:040x}"
        depth = len(file.relative_to(outer).parts) - 1
        file.rename(blob)
        file.symlink_to(Path(*[".."] * depth, "blobs", blob.name))
    return {"MODEL": model}


@valid
def further_files_of_a_download(builder: Builder) -> Settings:
    model = builder.sd()
    builder.tensors("loras/style.safetensors", lora(16))
    for name in (
        "README.md",
        ".gitattributes",
        ".DS_Store",
        "._model_index.json",
        "unet/._diffusion_pytorch_model.safetensors",
        ".git/HEAD",
        ".cache/huggingface/download/model_index.json.metadata",
        "samples/grid.png",
        "../loras/._style.safetensors",
        "../loras/.DS_Store",
    ):
        builder.bytes(f"model/{name}", b"\0\5\x16\7 nothing of a model")
    return {"MODEL": f"{model}/", "LORA_DIR": builder.folder / "loras"}


@valid
def checkpoint_with_rests_of_its_training(builder: Builder) -> Settings:
    return {"MODEL": builder.single("Dreamy Léger v8.safetensors")}


@valid
def weights_in_shards(builder: Builder) -> Settings:
    model = builder.sd()
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    (model / UNET).unlink()
    unet.save_pretrained(model / "unet", max_shard_size="60KB")
    return {"MODEL": model}


@valid
def pickles_next_to_the_weights(builder: Builder) -> Settings:
    model = builder.sd()
    torch.save(load_file(model / UNET), model / "unet/diffusion_pytorch_model.bin")
    return {"MODEL": model}


@valid
def line_ends_and_indents_of_another_system(builder: Builder) -> Settings:
    model = builder.sd()
    for file in model.rglob("*.json"):
        text = file.read_text(encoding="utf-8").replace("  ", "\t")
        file.write_bytes(text.replace("\n", "\r\n").encode())
    return {"MODEL": model}


@valid
def catalogue_of_two_models_and_an_autoencoder(builder: Builder) -> Settings:
    builder.sd()
    builder.sd("other model")
    shutil.copytree(builder.stock.sd / "vae", builder.folder / "better vae")
    models = [
        {"name": "photo", "source": "model", "vae_dir": "better vae"},
        {"name": "acme/drawing", "source": "other model", "defaults": {"scheduler": "euler"}},
    ]
    return {"MODELS_FILE": builder.json("models.json", {"models": models})}


@valid
def linked_model_folder(builder: Builder) -> Settings:
    builder.sd("disk/model")
    (builder.folder / "current").symlink_to("disk/model")
    return {"MODEL": builder.folder / "current"}
