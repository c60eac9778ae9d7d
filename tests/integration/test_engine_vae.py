"""An autoencoder that is used instead of the model's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.family import ModelError
from img2img_server.engine.options import ModelOptions
from tests.original_layout import write_sd1
from tests.tiny_models import write_sd

CPU = torch.device("cpu")


def key(model: Path, vae_dir: Path | None = None) -> str:
    """Returns the hash of all weights of a loaded model."""
    options = ModelOptions(vae_dir=vae_dir)
    return DiffusersDenoiser.load(str(model), CPU, torch.float32, options).state_key


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Returns a model, and the same one with another autoencoder."""
    model = write_sd(tmp_path / "model")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    vae = AutoencoderKL.from_pretrained(other / "vae")
    with torch.no_grad():
        for weight in vae.parameters():
            weight.mul_(1.01)
    vae.save_pretrained(other / "vae")
    return model, other


def test_the_folder_of_an_autoencoder_or_of_its_model_takes_the_place_of_the_own_one(
    models: tuple[Path, Path],
) -> None:
    model, other = models
    wanted = key(other)
    assert key(model) != wanted
    assert key(model, other / "vae") == wanted
    assert key(model, other) == wanted


def test_an_autoencoder_of_another_family_or_without_files_is_refused(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    model, other = models
    config = AutoencoderKL.load_config(other / "vae")
    AutoencoderKL.from_config(config, latent_channels=16).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match="latents of 16 channels"):
        key(model, tmp_path / "wide")
    with pytest.raises(ModelError, match="and no folder vae") as error:
        key(model, tmp_path)
    assert error.value.mistake.startswith("IMG2IMG_VAE_DIR: ")


def test_the_autoencoder_of_a_single_file_can_be_replaced(tmp_path: Path) -> None:
    pipeline, file = write_sd1(tmp_path)
    pipeline.vae.save_pretrained(tmp_path / "same")
    own = key(file)
    assert key(file, tmp_path / "same") == own
    with torch.no_grad():
        for weight in pipeline.vae.parameters():
            weight.mul_(1.01)
    pipeline.vae.save_pretrained(tmp_path / "other")
    assert key(file, tmp_path / "other") != own
