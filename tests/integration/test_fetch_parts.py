"""`img2img-server fetch-model --parts` fills the folder of parts for single files."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.family import ModelError
from img2img_server.engine.options import ModelOptions
from img2img_server.fetch_parts import fetch_parts
from img2img_server.settings import Settings
from tests.fake_hub import hub
from tests.integration.test_fetch_model import content, put, run
from tests.oracle.harness import models
from tests.original_layout import write_sd1


@functools.cache
def base() -> dict[str, bytes]:
    """Returns the files of a small model of the FLUX kind."""
    with tempfile.TemporaryDirectory() as folder:
        found = content(models()["flux dev"].write(Path(folder) / "model"))
    return {name: data for name, data in found.items() if not name.startswith("words/")}


def without_transformer() -> dict[str, bytes]:
    return {
        f"flux/{name}": data for name, data in base().items() if not name.startswith("transformer/")
    }


async def test_the_parts_of_a_hub_model_are_fetched_without_its_denoiser(tmp_path: Path) -> None:
    async with hub(base()) as (address, asked):
        words = ("--parts", "owner/tiny", tmp_path / "parts")
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
        first = await run(*words, **environment)
        assert first[0] == 0, first[1]
        weights = [name for name in asked if name.endswith(".safetensors")]
        assert weights
        assert not any(name.startswith("transformer/") for name in weights)
        asked.clear()
        again = await run(*words, **environment)
        assert again[0] == 0, again[1]
        assert not any(name.endswith(".safetensors") for name in asked), "they are there already"
    found = content(tmp_path / "parts")
    found.pop("flux/transformer/config.json", None)
    assert found == without_transformer(), "and no draft is left"


async def test_the_parts_in_a_bucket_are_fetched_and_used_by_a_single_file(
    engine_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = engine_settings()
    place = tmp_path / "one"
    place.mkdir()
    pipeline, file = write_sd1(place)
    pipeline.save_pretrained(tmp_path / "folder")
    put(settings, {f"base/{name}": data for name, data in content(tmp_path / "folder").items()})
    whole = DiffusersDenoiser.load(str(file), torch.device("cpu"), torch.float32)
    source, parts = f"s3://{settings.s3_bucket}/base", tmp_path / "parts"
    assert await asyncio.to_thread(fetch_parts, settings, source, parts)
    assert not (parts / "sd/unet").exists()
    assert not await asyncio.to_thread(fetch_parts, settings, source, parts)
    (parts / "sd/vae/diffusion_pytorch_model.safetensors").unlink()
    assert await asyncio.to_thread(fetch_parts, settings, source, parts), "it is completed"

    tensors = {key: it for key, it in load_file(file).items() if "first_stage" not in key}
    save_file(tensors, file)
    options = ModelOptions(model_parts_dir=parts)
    found = DiffusersDenoiser.load(str(file), torch.device("cpu"), torch.float32, options)
    ours, theirs = (each._model.pipeline.vae.state_dict() for each in (found, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_source_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"fluxx is no source of parts: write one of sd, sdxl, sd3"
    ):
        fetch_parts(Settings(), "fluxx", tmp_path)


def test_missing_parts_are_named_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    _, file = write_sd1(tmp_path)
    save_file({key: it for key, it in load_file(file).items() if "first_stage" not in key}, file)
    command = rf"img2img-server fetch-model --parts sd {tmp_path}$"
    options = ModelOptions(model_parts_dir=tmp_path)
    with pytest.raises(ModelError, match=command):
        DiffusersDenoiser.load(str(file), torch.device("cpu"), torch.float32, options)
