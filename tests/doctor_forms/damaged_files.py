"""Folders of models in which a file is damaged, incomplete or not what its name says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from tests.doctor_forms.forms import (
    AGAIN,
    CORRECT,
    PAGE,
    POINTER,
    TEXT,
    UNET,
    VAE,
    Builder,
    Settings,
    advice,
    broken,
    change_tensors,
    cut,
    edit,
)

INCOMPLETE = "cut|incomplete|truncat|shorter|ends|damaged|corrupt"


@broken(UNET, "lfs", advice=advice("git lfs pull", "download", "fetch", "run"))
def lfs_pointer_of_weights(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).write_bytes(POINTER)
    return {"MODEL": model}


@broken(
    r"tokenizer/(vocab|tokenizer)\.json",
    "lfs",
    advice=advice("git lfs pull", "download", "fetch", "run"),
)
def lfs_pointer_of_a_vocabulary(builder: Builder) -> Settings:
    model = builder.sd()
    for file in (model / "tokenizer").glob("*.json"):
        file.write_bytes(POINTER)
    (model / "tokenizer" / "vocab.json").write_bytes(POINTER)
    return {"MODEL": model}


@broken(VAE, "html|web page", advice=AGAIN)
def sign_in_page_instead_of_weights(builder: Builder) -> Settings:
    model = builder.sd()
    (model / VAE).write_bytes(PAGE)
    return {"MODEL": model}


@broken("scheduler/scheduler_config.json", "html|web page", advice=AGAIN)
def sign_in_page_instead_of_a_configuration(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "scheduler" / "scheduler_config.json").write_bytes(PAGE)
    return {"MODEL": model}


@broken(TEXT, "not a|no safetensors|JSON|damaged|corrupt|error", advice=AGAIN)
def json_of_an_error_instead_of_weights(builder: Builder) -> Settings:
    model = builder.sd()
    (model / TEXT).write_bytes(b'{"error":"Invalid username or password."}')
    return {"MODEL": model}


@broken(TEXT, INCOMPLETE, advice=AGAIN)
def cut_weights(builder: Builder) -> Settings:
    model = builder.sd()
    cut(model / TEXT)
    return {"MODEL": model}


@broken(UNET, INCOMPLETE, advice=AGAIN)
def weights_cut_inside_the_header(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).write_bytes((model / UNET).read_bytes()[:200])
    return {"MODEL": model}


@broken(VAE, "empty|0 bytes|no bytes", advice=AGAIN)
def empty_weights(builder: Builder) -> Settings:
    model = builder.sd()
    (model / VAE).write_bytes(b"")
    return {"MODEL": model}


@broken(UNET, "damaged|corrupt|longer|more bytes|trailing|too large|after", advice=AGAIN)
def bytes_after_the_weights(builder: Builder) -> Settings:
    model = builder.sd()
    with (model / UNET).open("ab") as file:
        file.write(bytes(4096))
    return {"MODEL": model}


@broken(UNET, f"zero|{INCOMPLETE}|empty", advice=AGAIN)
def preallocated_file_without_content(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).write_bytes(bytes((model / UNET).stat().st_size))
    return {"MODEL": model}


@broken(VAE, f"header|not a safetensors|{INCOMPLETE}", advice=AGAIN)
def header_of_an_exabyte(builder: Builder) -> Settings:
    model = builder.sd()
    content = (model / VAE).read_bytes()
    (model / VAE).write_bytes((1 << 60).to_bytes(8, "little") + content[8:])
    return {"MODEL": model}


@broken(VAE, f"header|not a safetensors|{INCOMPLETE}", advice=AGAIN)
def header_that_is_no_json(builder: Builder) -> Settings:
    model = builder.sd()
    content = (model / VAE).read_bytes()
    (model / VAE).write_bytes(content[:8] + b"\xff" * 64 + content[72:])
    return {"MODEL": model}


@broken(UNET, "finite|NaN", advice=advice("download", "fetch", "use", "replace", "train", "serve"))
def weights_with_nan(builder: Builder) -> Settings:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["mid_block.resnets.0.conv1.weight"][0, 0] = float("nan")
        return tensors

    model = builder.sd()
    change_tensors(model / UNET, spoil)
    return {"MODEL": model}


@broken(UNET, "uint8|integer", advice=advice("download", "fetch", "use", "replace", "serve"))
def weights_of_integers(builder: Builder) -> Settings:
    model = builder.sd()
    change_tensors(
        model / UNET,
        lambda found: {
            key: (it * 100).to(torch.uint8) if it.ndim > 1 else it for key, it in found.items()
        },
    )
    return {"MODEL": model}


def _shards(builder: Builder) -> Path:
    model = builder.sd()
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    (model / UNET).unlink()
    unet.save_pretrained(model / "unet", max_shard_size="60KB")
    assert len(list((model / "unet").glob("*.safetensors"))) > 2
    return model


@broken("diffusion_pytorch_model-00002-of-000", "missing|no such|not there|lacks", advice=AGAIN)
def missing_shard(builder: Builder) -> Settings:
    model = _shards(builder)
    next((model / "unet").glob("*-00002-of-*")).unlink()
    return {"MODEL": model}


@broken("diffusion_pytorch_model.safetensors.index.json", "unet", advice=AGAIN)
def shards_without_their_index(builder: Builder) -> Settings:
    model = _shards(builder)
    (model / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    return {"MODEL": model}


@broken("unet/diffusion_pytorch_model.safetensors.index.json", advice=AGAIN)
def cut_index(builder: Builder) -> Settings:
    model = _shards(builder)
    cut(model / "unet" / "diffusion_pytorch_model.safetensors.index.json")
    return {"MODEL": model}


@broken("unet/diffusion_pytorch_model-00001-of-000", advice=AGAIN)
def shard_of_another_download(builder: Builder) -> Settings:
    model = _shards(builder)
    first, second = sorted((model / "unet").glob("*.safetensors"))[:2]
    first.write_bytes(second.read_bytes())
    return {"MODEL": model}


@broken("unet/diffusion_pytorch_model.safetensors.crdownload", advice=AGAIN)
def unfinished_download_of_a_browser(builder: Builder) -> Settings:
    model = builder.sd()
    cut(model / UNET)
    (model / UNET).rename(model / (UNET + ".crdownload"))
    return {"MODEL": model}


@broken(UNET, "folder|directory", advice=AGAIN + "|" + advice("mount", "remove"))
def folder_with_the_name_of_a_weights_file(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).unlink()
    (model / UNET).mkdir()
    return {"MODEL": model}


@broken("vae", "is a file|no folder|not a folder|directory", advice=AGAIN)
def file_with_the_name_of_a_part(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "vae").rename(builder.folder / "moved")
    (model / "vae").write_bytes((builder.folder / "moved/config.json").read_bytes())
    return {"MODEL": model}


@broken("model_index.json", "byte order mark|BOM|UTF-8", advice=CORRECT)
def byte_order_mark_in_the_index(builder: Builder) -> Settings:
    model = builder.sd()
    file = model / "model_index.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return {"MODEL": model}


@broken("unet/config.json", "byte order mark|BOM|UTF-8", advice=CORRECT)
def byte_order_mark_in_a_configuration(builder: Builder) -> Settings:
    model = builder.sd()
    file = model / "unet/config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    return {"MODEL": model}


@broken("vae/config.json", "UTF-8|encod", advice=CORRECT)
def configuration_in_utf_16(builder: Builder) -> Settings:
    model = builder.sd()
    file = model / "vae/config.json"
    file.write_text(file.read_text(encoding="utf-8"), encoding="utf-16")
    return {"MODEL": model}


@broken("scheduler/scheduler_config.json", r"line \d|JSON", advice=CORRECT)
def trailing_comma_in_a_configuration(builder: Builder) -> Settings:
    model = builder.sd()
    file = model / "scheduler/scheduler_config.json"
    file.write_text(file.read_text(encoding="utf-8").rstrip().rstrip("}") + ",\n}")
    return {"MODEL": model}


@broken("text_encoder/config.json", "empty|0 bytes", advice=AGAIN)
def empty_configuration(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "text_encoder/config.json").write_bytes(b"")
    return {"MODEL": model}


@broken("unet/config.json", "object|list", advice=CORRECT + "|" + AGAIN)
def configuration_that_is_a_list(builder: Builder) -> Settings:
    model = builder.sd()
    file = model / "unet/config.json"
    file.write_text(json.dumps([json.loads(file.read_text(encoding="utf-8"))]))
    return {"MODEL": model}


@broken("unet/config.json", "block_out_channels", advice=CORRECT + "|" + AGAIN)
def configuration_with_a_value_of_the_wrong_type(builder: Builder) -> Settings:
    model = builder.sd()
    edit(model / "unet/config.json", block_out_channels="16, 32")
    return {"MODEL": model}


@broken(UNET, "lack|missing|no tensor|mid_block", advice=AGAIN)
def weights_without_one_layer(builder: Builder) -> Settings:
    model = builder.sd()
    change_tensors(
        model / UNET,
        lambda found: {key: it for key, it in found.items() if not key.startswith("mid_block.r")},
    )
    return {"MODEL": model}


@broken("unet/config.json", "missing|there is no|lacks", advice=AGAIN)
def missing_configuration(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "unet/config.json").unlink()
    return {"MODEL": model}


@broken(UNET, "link", advice=AGAIN)
def links_without_their_targets(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).unlink()
    (model / UNET).symlink_to("../../../blobs/4d7a213814aa6a1d3d8f08bfa1d9b1ad7ad1d6c9")
    return {"MODEL": model}


@broken("unet", "link", advice=AGAIN + "|" + CORRECT)
def link_to_itself(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "unet").rename(builder.folder / "moved")
    (model / "unet").symlink_to("unet")
    return {"MODEL": model}


@broken(UNET, "fifo|pipe|not a regular|no regular|not a file", advice=AGAIN)
def named_pipe_instead_of_weights(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).unlink()
    os.mkfifo(model / UNET)
    return {"MODEL": model}


@broken(UNET, "not named|of another model|has no|lack|missing|does not", advice=AGAIN)
def weights_that_are_one_unnamed_tensor(builder: Builder) -> Settings:
    model = builder.sd()
    whole = torch.cat([it.flatten() for it in load_file(model / UNET).values()])
    save_file({"weight": whole}, model / UNET)
    return {"MODEL": model}
