"""`img2img-server doctor` names the file and the cure for many kinds of broken models."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from img2img_server.engine.device_memory import PeakMeter
from img2img_server.setting_checks import mistakes_of
from img2img_server.settings import Settings
from img2img_server.worker.doctor import Report, examine
from tests.original_layout import write_sd1
from tests.tiny_models import write_sd, write_sdxl

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def diagnose(source: Path, **settings: Any) -> tuple[Report, float]:
    """Does what the command does; returns its report and the seconds of CPU time it took."""
    began = time.process_time()
    options = {"warm_up_sizes": "64x64", "device": "cpu", **settings}
    given = Settings(model=str(source), **options)
    mistakes = mistakes_of("doctor", given, skip=frozenset())
    report = Report(problems=mistakes) if mistakes else examine(given)
    return report, time.process_time() - began


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in diffusers' layout and as a single file."""
    place = tmp_path_factory.mktemp("models")
    write_sd(place / "sd")
    write_sdxl(place / "sdxl")
    (place / "one").mkdir()
    write_sd1(place / "one")[1].rename(place / "file.safetensors")
    return place


class Place:
    """Copies of good models to damage."""

    def __init__(self, places: Path, folder: Path) -> None:
        self._places, self.folder = places, folder

    def model(self, name: str = "sd") -> Path:
        return shutil.copytree(self._places / name, self.folder / "model")

    def file(self) -> Path:
        return Path(
            shutil.copy(self._places / "file.safetensors", self.folder / "file.safetensors")
        )

    def other(self, name: str) -> Path:
        return self._places / name


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def pruned_file(it: Place) -> Path:
    file = it.file()
    edit(file, lambda found: {key: it for key, it in found.items() if ".out.2." not in key})
    return file


# Each breaks a model and returns the source to examine.


def html_file(it: Place) -> Path:
    file = it.folder / "page.safetensors"
    file.write_text("\n <!DOCTYPE html><title>Sign in</title>")
    return file


def json_answer(it: Place) -> Path:
    file = it.folder / "answer.safetensors"
    file.write_text('{"error": "Access to model is restricted"}')
    return file


def lfs_pointer_file(it: Place) -> Path:
    file = it.folder / "lfs.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    return file


def cut_file(it: Place) -> Path:
    file = it.file()
    file.write_bytes(file.read_bytes()[:-1000])
    return file


def cut_in_header(it: Place) -> Path:
    file = it.file()
    file.write_bytes(file.read_bytes()[:100])
    return file


def empty_file(it: Place) -> Path:
    file = it.folder / "empty.safetensors"
    file.touch()
    return file


def zipped(it: Place) -> Path:
    file = it.folder / "model.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(it.file(), "file.safetensors")
    return file


def zip_named_safetensors(it: Place) -> Path:
    return zipped(it).rename(it.folder / "zipped.safetensors")


def tar_file(it: Place) -> Path:
    name = shutil.make_archive(str(it.folder / "model"), "gztar", it.other("sd"))
    return Path(name)


def pickle_named_safetensors(it: Place) -> Path:
    file = it.folder / "pickle.safetensors"
    torch.save({"state_dict": load_file(it.file())}, file)
    return file


def pickle_file(it: Place) -> Path:
    file = it.folder / "old.ckpt"
    torch.save({"state_dict": load_file(it.file())}, file)
    return file


def no_tokenizer_files(it: Place) -> Path:
    folder = it.model()
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    return folder


def empty_vocabulary(it: Place) -> Path:
    folder = it.model()
    for file in (folder / "tokenizer").glob("*.json"):
        if file.name in ("vocab.json", "tokenizer.json"):
            file.write_text("{}")
    return folder


def foreign_vae(it: Place) -> Path:
    folder = it.model()
    edit_json(folder / "vae/config.json", latent_channels=16)
    return folder


def vae_of_sixteen_channels(it: Place) -> Path:
    from tests.tiny_flow import autoencoder

    folder = it.model()
    shutil.rmtree(folder / "vae")
    autoencoder().save_pretrained(folder / "vae")
    return folder


def channels(count: int) -> Callable[[Place], Path]:
    def broken(it: Place) -> Path:
        file, key = it.file(), "model.diffusion_model.input_blocks.0.0.weight"
        edit(
            file,
            lambda found: {**found, key: found[key].repeat(1, 3, 1, 1)[:, :count].contiguous()},
        )
        return file

    return broken


def channels_of_folder(count: int) -> Callable[[Place], Path]:
    def broken(it: Place) -> Path:
        folder = it.model()
        edit_json(folder / "unet/config.json", in_channels=count)
        edit(
            folder / UNET,
            lambda found: {
                **found,
                "conv_in.weight": found["conv_in.weight"]
                .repeat(1, 3, 1, 1)[:, :count]
                .contiguous(),
            },
        )
        return folder

    return broken


def refiner(it: Place) -> Path:
    folder = it.model("sdxl")
    edit_json(folder / "model_index.json", requires_aesthetics_score=True)
    return folder


def refiner_file(it: Place) -> Path:
    file = it.folder / "refiner.safetensors"
    tensors = {
        key: tensor for key, tensor in load_file(it.file()).items() if "cond_stage" not in key
    }
    tensors["conditioner.embedders.0.model.token_embedding.weight"] = torch.zeros(8, 8)
    tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.zeros(8, 8)
    save_file(tensors, file)
    return file


def lora_file(it: Place) -> Path:
    file = it.folder / "style.safetensors"
    names = ("lora_down.weight", "lora_up.weight", "alpha")
    save_file({f"lora_unet_mid_block_{name}": torch.ones(1) for name in names}, file)
    return file


def lora_folder(it: Place) -> Path:
    (it.folder / "style").mkdir()
    lora_file(it).rename(it.folder / "style/pytorch_lora_weights.safetensors")
    return it.folder / "style"


def controlnet_file(it: Place) -> Path:
    file = it.folder / "canny.safetensors"
    save_file({"control_model.input_blocks.0.0.weight": torch.ones(2, 2)}, file)
    return file


def controlnet_of_diffusers(it: Place) -> Path:
    file = it.folder / "canny.safetensors"
    names = ("controlnet_cond_embedding.conv_in.weight", "controlnet_mid_block.weight")
    save_file({name: torch.ones(2, 2) for name in (*names, "conv_in.weight")}, file)
    return file


def controlnet_folder(it: Place) -> Path:
    folder = it.folder / "canny"
    folder.mkdir()
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    return folder


def vae_file(it: Place) -> Path:
    file = it.folder / "vae.safetensors"
    found = load_file(it.file())
    start = "first_stage_model."
    save_file({key[len(start) :]: it for key, it in found.items() if key.startswith(start)}, file)
    return file


def embedding_file(it: Place) -> Path:
    file = it.folder / "worn.safetensors"
    save_file({"emb_params": torch.ones(2, 768)}, file)
    return file


def unet_folder(it: Place) -> Path:
    return it.model() / "unet"


def index_of_absent_shard(it: Place) -> Path:
    folder = it.model()
    tensors = load_file(folder / TEXT)
    (folder / TEXT).unlink()
    names, half = sorted(tensors), len(tensors) // 2
    shards = {
        f"model-0000{place}-of-00002.safetensors": {key: tensors[key] for key in part}
        for place, part in ((1, names[:half]), (2, names[half:]))
    }
    weight_map = {key: shard for shard, part in shards.items() for key in part}
    for shard, part in shards.items():
        save_file(part, folder / "text_encoder" / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "text_encoder/model-00002-of-00002.safetensors").unlink()
    return folder


def truncated_shard(it: Place) -> Path:
    folder = index_of_absent_shard(it)
    first = folder / "text_encoder/model-00001-of-00002.safetensors"
    second = folder / "text_encoder/model-00002-of-00002.safetensors"
    second.write_bytes(first.read_bytes()[:-9])
    return folder


def config_of_another_width(it: Place) -> Path:
    folder = it.model()
    edit_json(folder / "text_encoder/config.json", hidden_size=32)
    return folder


def unet_of_another_width(it: Place) -> Path:
    folder = it.model()
    edit_json(folder / "unet/config.json", block_out_channels=[24, 48])
    return folder


def nan_weights(it: Place) -> Path:
    folder = it.model()
    edit(
        folder / UNET, lambda found: {**found, "conv_out.bias": found["conv_out.bias"] * torch.nan}
    )
    return folder


def nan_autoencoder(it: Place) -> Path:
    folder = it.model()
    edit(folder / VAE, lambda it: {key: tensor * torch.inf for key, tensor in it.items()})
    return folder


def file_in_blocks_of_8_bits(it: Place) -> Path:
    file = it.file()

    def scaled(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = {}
        for key, tensor in found.items():
            changed[key] = tensor
            if key.startswith("model.diffusion_model.") and tensor.ndim == 2:
                changed[key] = (tensor * 2).to(torch.float8_e4m3fn)
                changed[f"{key}_scale"] = torch.ones(len(tensor), 2)
        return changed

    edit(file, scaled)
    return file


def gguf_as_model(it: Place) -> Path:
    file = it.folder / "flux1-dev-Q4.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))
    return file


def symlink_loop(it: Place) -> Path:
    link = it.folder / "loop"
    link.symlink_to(link)
    return link


def loop_of_a_part(it: Place) -> Path:
    folder = it.model()
    (folder / UNET).unlink()
    (folder / UNET).symlink_to(folder / UNET)
    return folder


def dangling_weights(it: Place) -> Path:
    """The folder of a hub's cache was copied without the files that its links name."""
    folder = it.model()
    (folder / UNET).unlink()
    (folder / UNET).symlink_to("../../blobs/abc")
    return folder


def unreadable_folder(it: Place) -> Path:
    folder = it.model()
    (folder / "vae").chmod(0)
    return folder


def folder_inside_folder(it: Place) -> Path:
    it.model()
    return it.folder


def empty_folder(it: Place) -> Path:
    (it.folder / "nothing").mkdir()
    return it.folder / "nothing"


def folder_of_single_file(it: Place) -> Path:
    (it.folder / "checkpoints").mkdir()
    it.file().rename(it.folder / "checkpoints/dreamy.safetensors")
    return it.folder / "checkpoints"


def comfy_text_encoder(it: Place) -> Path:
    file = it.folder / "clip_l.safetensors"
    save_file({"text_model.embeddings.token_embedding.weight": torch.ones(8, 8)}, file)
    return file


def video_model(it: Place) -> Path:
    folder = it.folder / "video"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    return folder


def list_as_index(it: Place) -> Path:
    folder = it.model()
    (folder / "model_index.json").write_text("[1, 2]")
    return folder


def binary_config(it: Place) -> Path:
    folder = it.model()
    (folder / "unet/config.json").write_bytes(b"\xff\xfe\x00\x01")
    return folder


def without_config(it: Place) -> Path:
    folder = it.model()
    (folder / "unet/config.json").unlink()
    return folder


def unknown_class(it: Place) -> Path:
    folder = it.model()
    edit_json(folder / "model_index.json", unet=["diffusers", "UNet9DModel"])
    return folder


def own_code(it: Place) -> Path:
    folder = it.model()
    edit_json(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    return folder


def text_encoder_of_sd2(it: Place) -> Path:
    folder = it.model()
    edit_json(folder / "unet/config.json", cross_attention_dim=24)
    return folder


PARTS = "fetch the files again, or check that they belong together"
# The damage to a model, with the file and the cure that the problem must name.
BROKEN: dict[str, tuple[Callable[[Place], Path], str, str]] = {
    "html": (html_file, "page.safetensors", "fetch the file again"),
    "json": (json_answer, "answer.safetensors", "fetch the file again"),
    "lfs": (lfs_pointer_file, "lfs.safetensors", "git lfs pull"),
    "cut": (cut_file, "file.safetensors", "cut off: it has 2"),
    "cut-header": (cut_in_header, "file.safetensors", "in its header, after 100 bytes: fetch"),
    "empty": (empty_file, "empty.safetensors", "is empty: fetch"),
    "zip": (zipped, "model.zip", "unpack it"),
    "zip-renamed": (zip_named_safetensors, "zipped.safetensors", "unpack it"),
    "tar": (tar_file, "model.tar.gz", "unpack it"),
    "pickle-renamed": (pickle_named_safetensors, "pickle.safetensors", "use a .safetensors file"),
    "pickle": (pickle_file, "old.ckpt", "use a .safetensors file"),
    "no-tokenizer-files": (no_tokenizer_files, "tokenizer of", "fetch the files of this folder"),
    "empty-vocabulary": (empty_vocabulary, "model/tokenizer", PARTS),
    "vae-config": (foreign_vae, f"{VAE}: decoder.conv_in.weight has the size", PARTS),
    "vae-of-16-channels": (vae_of_sixteen_channels, "vae of", "fetch the folder vae"),
    "9-channels": (channels(9), "file.safetensors", "9 input channels instead of 4"),
    "8-channels": (channels(8), "file.safetensors", "use a model for text to image"),
    "9-channels-folder": (channels_of_folder(9), "model: the model's UNet", "for text to image"),
    "8-channels-folder": (channels_of_folder(8), "model: the model's UNet", "for text to image"),
    "pruned": (pruned_file, "file.safetensors is incomplete: it lacks", "fetch the file again"),
    "refiner": (refiner, "/model", "use an SDXL base model"),
    "refiner-file": (refiner_file, "refiner.safetensors", "use an SDXL base model"),
    "lora": (lora_file, "style.safetensors", "put it into IMG2IMG_LORA_DIR"),
    "lora-folder": (lora_folder, "/style", "put it into IMG2IMG_LORA_DIR"),
    "controlnet": (controlnet_file, "canny.safetensors", "name the model that it belongs to"),
    "controlnet-diffusers": (controlnet_of_diffusers, "canny.safetensors", "name the model"),
    "controlnet-folder": (controlnet_folder, "/canny", "holds ControlNetModel only: name"),
    "vae": (vae_file, "vae.safetensors", "name a model"),
    "embedding": (embedding_file, "worn.safetensors", "put it into IMG2IMG_EMBEDDINGS_DIR"),
    "text-encoder": (comfy_text_encoder, "clip_l.safetensors", "name a model"),
    "part": (unet_folder, "model/unet", "it is a part of a model: name"),
    "absent-shard": (index_of_absent_shard, "lacks model-00002-of-00002", "fetch the file again"),
    "cut-shard": (truncated_shard, "model-00002-of-00002.safetensors", "cut off"),
    "text-width": (config_of_another_width, "text_encoder/model.safetensors: its weights", PARTS),
    "unet-width": (
        unet_of_another_width,
        "model.safetensors: conv_in.bias has the size [16]",
        PARTS,
    ),
    "text-of-another": (text_encoder_of_sd2, "model/unet", PARTS),
    "nan": (nan_weights, "unet: conv_out.bias", "fetch the file again"),
    "nan-vae": (nan_autoencoder, "vae: decoder", "fetch the file again"),
    "blocks-of-8-bits": (
        file_in_blocks_of_8_bits,
        "file.safetensors",
        "use the file in fp16, bf16",
    ),
    "gguf": (gguf_as_model, "flux1-dev-Q4.gguf", "name it with IMG2IMG_GGUF_FILE"),
    "link-loop": (symlink_loop, "/loop", "correct the link"),
    "link-loop-part": (loop_of_a_part, UNET, "correct the link"),
    "dangling-link": (dangling_weights, UNET, "correct the link, or fetch the file again"),
    "folder-in-folder": (folder_inside_folder, "subfolder model has one", "name "),
    "empty-folder": (empty_folder, "/nothing", "fetch the model into it"),
    "folder-of-file": (folder_of_single_file, "/checkpoints", "checkpoints/dreamy.safetensors"),
    "video": (video_model, "/video", "use a model of one of these classes: "),
    "list-index": (list_as_index, "model_index.json", "fetch the file again"),
    "binary-config": (binary_config, "unet/config.json", "fetch the file again"),
    "no-config": (without_config, "unet/config.json", "fetch the file again"),
    "unknown-class": (unknown_class, "model_index.json names", "use a model without it"),
    "own-code": (own_code, "my_unet.MyUNet", "use a model without it"),
}
SECONDS = 10


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_model_is_named_with_its_cure(kind: str, places: Path, tmp_path: Path) -> None:
    damage, file, cure = BROKEN[kind]
    report, seconds = diagnose(damage(Place(places, tmp_path)))

    (problem,) = report.problems
    assert problem.startswith("IMG2IMG_MODEL: ")
    assert file in problem
    assert cure in problem
    assert not any(word in problem for word in ("Traceback", "torch.Size", "https://", "Error("))
    assert seconds < SECONDS


def test_a_folder_that_must_not_be_read_is_named(places: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("needs a user that is not root")
    (problem,) = diagnose(unreadable_folder(Place(places, tmp_path)))[0].problems
    assert "vae" in problem
    assert "Permission denied: correct its permissions" in problem


def test_the_peak_of_memory_of_a_step_is_reported(places: Path) -> None:
    report, _ = diagnose(places / "sd")
    assert report.is_fine
    assert report.peaks["64x64"] > report.weights_bytes
    (line,) = (line for line in report.lines() if line.startswith("  64x64: "))
    assert re.search(r"at most \d+ MiB in use$", line)


def test_a_peak_is_that_of_its_own_time() -> None:
    cpu, size, peaks = torch.device("cpu"), 2**28, []
    for is_busy in (False, True, False):
        with PeakMeter(cpu) as meter:
            if is_busy:
                with mmap.mmap(-1, size) as memory:
                    memory.write(b"\x01" * size)
        peaks.append(meter.peak)
    assert peaks[1] - peaks[0] > size / 2
    assert peaks[1] - peaks[2] > size / 2
