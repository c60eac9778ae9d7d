"""Loads and warms up an engine by its settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from img2img_server.engine.device import choose_device, choose_dtype
from img2img_server.engine.family import ModelError
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions
from img2img_server.settings import Settings, SettingsError
from tests.engine_bench import images, job, run
from tests.tiny_models import write_sd

TOML = """
name = "pebble"
[defaults]
scheduler = "euler"
num_inference_steps = 3
guidance_scale = 2.0
"""


def test_an_engine_comes_up_warm_with_the_models_own_defaults(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "model", tiny_vae=True)
    (folder / "img2img.toml").write_text(TOML, encoding="utf-8")
    engine = load_engine(EngineOptions.of(Settings(model=str(folder), max_batch_size=3)))
    try:
        assert (engine.model.name, engine.model.schedulers[0]) == ("pebble", "euler")
        assert (engine.device, engine.max_batch_size) == ("cpu", 3)
        assert [image.shape for image in images(run(engine, job()))] == [(64, 72, 3)]
    finally:
        engine.stop()


def test_a_model_kept_in_half_precision_is_widened_on_a_cpu(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "model", tiny_vae=True, dtype=torch.float16)
    engine = load_engine(EngineOptions.of(Settings(model=str(folder))))
    try:
        assert len(images(run(engine, job()))) == 1
    finally:
        engine.stop()


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no model_index\.json"):
        load_engine(EngineOptions.of(Settings(model=str(tmp_path))))


def test_a_broken_model_is_refused(tmp_path: Path) -> None:
    folder = write_sd(tmp_path / "model", tiny_vae=True)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.unlink()

    with pytest.raises(ModelError, match="unet has no weights: fetch the files"):
        load_engine(EngineOptions.of(Settings(model=str(folder))))


@pytest.mark.parametrize("name", ["cuda", "gpu", "cuda:9"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="IMG2IMG_DEVICE: "):
        choose_device(name)


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float16", "cuda", torch.float16),
    ],
)
def test_the_dtype_fits_the_device(name: str, device: str, dtype: torch.dtype) -> None:
    assert choose_dtype(name, torch.device(device)) == dtype


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(SettingsError, match="IMG2IMG_DTYPE: 'int4' is no dtype"):
        choose_dtype("int4", torch.device("cpu"))


def test_what_the_front_roles_import_leaves_torch_out() -> None:
    engine = "from img2img_server.engine import base, model_spec, scheduler"
    twin = "from img2img_server.testing import fake_engine"
    read = "model_spec.read_model_spec('')"  # This import loads all model families.
    code = f"import sys; {engine}; {twin}; {read}; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)

    assert answer.stdout.strip() == b"False"
