"""LoRAs, embeddings and autoencoders that are damaged, in the wrong folder or of another model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.doctor_forms.forms import (
    AGAIN,
    CORRECT,
    PAGE,
    POINTER,
    SERVE,
    VAE,
    Builder,
    Settings,
    advice,
    broken,
    change_tensors,
    cut,
    lora,
)
from tests.doctor_forms.wrong_models import OTHER
from tests.tiny_flow import autoencoder

MOVE = advice("move", "put", "remove", "delete", "use", "set", "choose", "convert", "rename")
FILE = "style.safetensors"


def _loras(builder: Builder) -> dict[str, Path]:
    (builder.folder / "loras").mkdir(exist_ok=True)
    return {"MODEL": builder.sd(), "LORA_DIR": builder.folder / "loras"}


def _embeddings(builder: Builder) -> dict[str, Path]:
    (builder.folder / "words").mkdir(exist_ok=True)
    return {"MODEL": builder.sd(), "EMBEDDINGS_DIR": builder.folder / "words"}


def _in_loras(builder: Builder, shapes: Mapping[str, Any]) -> Settings:
    builder.tensors(f"loras/{FILE}", shapes)
    return _loras(builder)


@broken(FILE, "another model|other model|not of|does not fit|FLUX", advice=MOVE, starts=True)
def lora_of_flux(builder: Builder) -> Settings:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    shapes = {f"{name}.lora_A.weight": (4, 3072), f"{name}.lora_B.weight": (3072, 4)}
    return _in_loras(builder, shapes)


@broken(FILE, "768", "16", advice=MOVE, starts=True)
def lora_of_another_width(builder: Builder) -> Settings:
    return _in_loras(builder, lora(768))


@broken(FILE, "cut|incomplete|truncat|shorter|damaged", advice=AGAIN, starts=True)
def cut_lora(builder: Builder) -> Settings:
    cut(builder.tensors(f"loras/{FILE}", lora(16)))
    return _loras(builder)


@broken(FILE, "lfs", advice=AGAIN, starts=True)
def lfs_pointer_of_a_lora(builder: Builder) -> Settings:
    builder.bytes(f"loras/{FILE}", POINTER)
    return _loras(builder)


@broken(FILE, "html|web page", advice=AGAIN, starts=True)
def sign_in_page_instead_of_a_lora(builder: Builder) -> Settings:
    builder.bytes(f"loras/{FILE}", PAGE)
    return _loras(builder)


@broken(FILE, "empty|0 bytes", advice=AGAIN, starts=True)
def empty_lora(builder: Builder) -> Settings:
    builder.bytes(f"loras/{FILE}", b"")
    return _loras(builder)


@broken(FILE, "lora_up|up|half|pair", advice=AGAIN + "|" + MOVE, starts=True)
def lora_with_half_of_its_tensors(builder: Builder) -> Settings:
    return _in_loras(builder, {key: it for key, it in lora(16).items() if "lora_down" in key})


@broken(FILE, "finite|NaN", advice=AGAIN + "|" + MOVE, starts=True)
def lora_with_nan(builder: Builder) -> Settings:
    shapes = lora(16)
    return _in_loras(builder, {key: torch.full(it, float("nan")) for key, it in shapes.items()})


@broken(FILE, "checkpoint|whole model|IMG2IMG_MODEL", advice=MOVE, starts=True)
def checkpoint_among_the_loras(builder: Builder) -> Settings:
    builder.single(f"loras/{FILE}")
    return _loras(builder)


@broken(FILE, "embedding", "IMG2IMG_EMBEDDINGS_DIR", advice=MOVE, starts=True)
def embedding_among_the_loras(builder: Builder) -> Settings:
    return _in_loras(builder, {"emb_params": (2, 16)})


@broken("style.pt", r"safetensors", advice=MOVE, starts=True)
def pickle_among_the_loras(builder: Builder) -> Settings:
    (builder.folder / "loras").mkdir()
    torch.save({key: torch.zeros(it) for key, it in lora(16).items()}, builder.folder / "x.pt")
    (builder.folder / "x.pt").rename(builder.folder / "loras/style.pt")
    return _loras(builder)


@broken("styles", "subfolder|folder|not read", advice=MOVE, starts=True)
def loras_in_a_subfolder(builder: Builder) -> Settings:
    builder.tensors(f"loras/styles/{FILE}", lora(16))
    return _loras(builder)


@broken("style.safetensors", "folder|directory", "IMG2IMG_LORA_DIR", advice=SERVE)
def file_as_the_folder_of_loras(builder: Builder) -> Settings:
    return {"MODEL": builder.sd(), "LORA_DIR": builder.tensors(FILE, lora(16))}


@broken("no-such-loras", "IMG2IMG_LORA_DIR", advice=SERVE + "|" + advice("create", "correct"))
def missing_folder_of_loras(builder: Builder) -> Settings:
    return {"MODEL": builder.sd(), "LORA_DIR": builder.folder / "no-such-loras"}


@broken("badhands.safetensors", "768", "16", advice=MOVE, starts=True)
def embedding_of_another_width(builder: Builder) -> Settings:
    builder.tensors("words/badhands.safetensors", {"emb_params": (2, 768)})
    return _embeddings(builder)


@broken("badhands.safetensors", "SDXL|XL|clip_g|another (model|family)", advice=MOVE, starts=True)
def embedding_of_sdxl(builder: Builder) -> Settings:
    builder.tensors("words/badhands.safetensors", {"clip_l": (2, 768), "clip_g": (2, 1280)})
    return _embeddings(builder)


@broken("style.safetensors", "LoRA", "IMG2IMG_LORA_DIR", advice=MOVE, starts=True)
def lora_among_the_embeddings(builder: Builder) -> Settings:
    builder.tensors("words/style.safetensors", lora(16))
    return _embeddings(builder)


@broken("badhands.pt", "safetensors", advice=MOVE, starts=True)
def pickle_among_the_embeddings(builder: Builder) -> Settings:
    settings = _embeddings(builder)
    content = {"string_to_param": {"*": torch.zeros(2, 16)}}
    torch.save(content, builder.folder / "words/badhands.pt")
    return settings


@broken("badhands.png", "safetensors", advice=MOVE, starts=True)
def image_of_an_embedding(builder: Builder) -> Settings:
    settings = _embeddings(builder)
    Image.new("RGB", (8, 8)).save(builder.folder / "words/badhands.png")
    return settings


@broken("badhands.safetensors", "cut|incomplete|truncat|shorter|damaged", advice=AGAIN, starts=True)
def cut_embedding(builder: Builder) -> Settings:
    cut(builder.tensors("words/badhands.safetensors", {"emb_params": (2, 16)}), 0.8)
    return _embeddings(builder)


@broken("no-such-words", "IMG2IMG_EMBEDDINGS_DIR", advice=SERVE + "|" + advice("create", "correct"))
def missing_folder_of_embeddings(builder: Builder) -> Settings:
    return {"MODEL": builder.sd(), "EMBEDDINGS_DIR": builder.folder / "no-such-words"}


@broken("IMG2IMG_VAE_DIR|vae", "16", r"\b4\b", "channels", advice=OTHER)
def other_autoencoder_of_flux(builder: Builder) -> Settings:
    autoencoder().save_pretrained(builder.folder / "ae")
    return {"MODEL": builder.sd(), "VAE_DIR": builder.folder / "ae"}


@broken("vae-ft-mse.safetensors", "IMG2IMG_VAE_DIR", "folder|directory", advice=SERVE)
def file_as_the_folder_of_an_autoencoder(builder: Builder) -> Settings:
    shutil.copy(builder.stock.sd / VAE, builder.folder / "vae-ft-mse.safetensors")
    return {"MODEL": builder.sd(), "VAE_DIR": builder.folder / "vae-ft-mse.safetensors"}


@broken("config.json", "mse", advice=AGAIN + "|" + SERVE)
def autoencoder_without_its_configuration(builder: Builder) -> Settings:
    start = "first_stage_model."
    builder.single(
        "mse/vae-ft-mse.safetensors",
        lambda key: key.removeprefix(start) if key.startswith(start) else None,
    )
    return {"MODEL": builder.sd(), "VAE_DIR": builder.folder / "mse"}


@broken("mse/diffusion_pytorch_model.safetensors", "finite|NaN", advice=AGAIN + "|" + OTHER)
def autoencoder_with_nan(builder: Builder) -> Settings:
    shutil.copytree(builder.stock.sd / "vae", builder.folder / "mse")
    change_tensors(
        builder.folder / "mse/diffusion_pytorch_model.safetensors",
        lambda found: {key: it * float("nan") for key, it in found.items()},
    )
    return {"MODEL": builder.sd(), "VAE_DIR": builder.folder / "mse"}


@broken("IMG2IMG_VAE_DIR", "nothing-here", advice=AGAIN + "|" + SERVE)
def empty_folder_as_an_autoencoder(builder: Builder) -> Settings:
    (builder.folder / "nothing-here").mkdir()
    return {"MODEL": builder.sd(), "VAE_DIR": builder.folder / "nothing-here"}


@broken("IMG2IMG_TINY_VAE", "AutoencoderKL|not a tiny|full", advice=SERVE)
def full_autoencoder_as_the_tiny_one(builder: Builder) -> Settings:
    shutil.copytree(builder.stock.sd / "vae", builder.folder / "taesd")
    return {"MODEL": builder.sd(), "TINY_VAE": builder.folder / "taesd"}


@broken("IMG2IMG_TINY_VAE", "taesd/config.json", advice=CORRECT + "|" + AGAIN)
def tiny_autoencoder_whose_configuration_is_no_json(builder: Builder) -> Settings:
    builder.bytes("taesd/config.json", b"{'_class_name': 'AutoencoderTiny'}")
    return {"MODEL": builder.sd(), "TINY_VAE": builder.folder / "taesd"}


@broken("no-such-file.gguf", "IMG2IMG_GGUF_FILE", advice=SERVE + "|" + CORRECT)
def missing_gguf_file(builder: Builder) -> Settings:
    return {"MODEL": builder.sd(), "GGUF_FILE": builder.folder / "no-such-file.gguf"}


@broken("parts", "IMG2IMG_MODEL_PARTS_DIR", advice=SERVE + "|" + advice("create", "correct"))
def missing_folder_of_parts(builder: Builder) -> Settings:
    file = builder.single(
        "unet-only.safetensors",
        lambda key: None if key.startswith("cond_stage_model.") else key,
    )
    return {"MODEL": file, "MODEL_PARTS_DIR": builder.folder / "parts"}


def _without_autoencoder(builder: Builder) -> Path:
    return builder.single(
        "dreamy.safetensors",
        lambda key: None if key.startswith("first_stage_model.") else key,
    )


@broken("parts/sd/vae/diffusion_pytorch_model", "finite|NaN", advice=AGAIN + "|" + OTHER)
def autoencoder_with_nan_in_the_folder_of_parts(builder: Builder) -> Settings:
    folder = builder.folder / "parts/sd/vae"
    shutil.copytree(builder.stock.sd / "vae", folder)
    change_tensors(
        folder / "diffusion_pytorch_model.safetensors",
        lambda found: {key: it * float("nan") for key, it in found.items()},
    )
    return {"MODEL": _without_autoencoder(builder), "MODEL_PARTS_DIR": builder.folder / "parts"}


def _part_of_file(builder: Builder, change: Any) -> Settings:
    """Writes the autoencoder as a file in the folder of parts."""
    start = "first_stage_model."
    single = builder.stock.single
    tensors = {
        key.removeprefix(start): change(it) for key, it in single.items() if key.startswith(start)
    }
    builder.tensors("parts/sd/vae-ft-mse.safetensors", tensors)
    return {"MODEL": _without_autoencoder(builder), "MODEL_PARTS_DIR": builder.folder / "parts"}


@broken("parts/sd/vae-ft-mse.safetensors", "finite|NaN", advice=AGAIN + "|" + OTHER)
def file_with_nan_in_the_folder_of_parts(builder: Builder) -> Settings:
    return _part_of_file(builder, lambda tensor: tensor * float("nan"))


@broken("parts/sd/vae-ft-mse.safetensors", "quantised|integers", advice=AGAIN + "|" + OTHER)
def file_with_integers_in_the_folder_of_parts(builder: Builder) -> Settings:
    return _part_of_file(builder, lambda tensor: (tensor * 50).to(torch.int8))
