"""`img2img-server doctor` examines models, and names broken files without a stack trace."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from img2img_server.setting_names import PREFIX
from img2img_server.settings import Settings
from img2img_server.worker.doctor import Report, examine
from tests.oracle.harness import models
from tests.tiny_models import write_sd

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


def report_of(folder: Path, **settings: object) -> Report:
    options = {"warm_up_sizes": "64x64, 72x64", "device": "cpu", **settings}
    return examine(Settings(model=str(folder), **options))


def test_a_good_model_is_described_with_a_step_of_each_size(folder: Path) -> None:
    tensors = load_file(folder / TEXT)
    save_file({**tensors, "logit_scale": torch.ones(1)}, folder / TEXT, {"format": "pt"})
    report = report_of(folder)

    assert (report.is_fine, report.model, report.family) == (True, "model", "sd")
    assert list(report.sizes) == ["64x64", "72x64"]
    assert {part["name"] for part in report.parts} == {"unet", "vae", "text_encoder"}
    files = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert 0.9 * files < report.weights_bytes < files
    assert report.schedulers[0] == "ddim"
    (note,) = report.notes
    assert "model_tensors_ignored" in note
    assert note.endswith("text_encoder: logit_scale")
    lines = list(report.lines())
    assert lines[-1] == "a worker would start"
    assert any(line.startswith("  64x64: runs, ") for line in lines)


def cut(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-7])


def nine_channels(folder: Path) -> None:
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "in_channels": 9}))


def other_scheduler(folder: Path) -> None:
    file = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "KDPM2DiscreteScheduler"}))


def no_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def half_index(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffu')


BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut": (cut, UNET, "is cut off"),
    "pointer": (lambda it: (it / TEXT).write_bytes(POINTER), TEXT, "run `git lfs pull`"),
    "no-part": (lambda it: shutil.rmtree(it / "vae"), "vae", "fetch its files again"),
    "nine-channels": (nine_channels, "model", "9 input channels"),
    "no-tokenizer": (lambda it: shutil.rmtree(it / "tokenizer"), "tokenizer", "has no folder"),
    "scheduler": (other_scheduler, "KDPM2DiscreteScheduler", "Choose one of"),
    "no-index": (no_index, "model", "it has no model_index.json"),
    "half-index": (half_index, "model_index.json", "is no JSON"),
}


@pytest.mark.parametrize("kind", sorted(BROKEN))
def test_a_broken_model_is_named_with_its_cure(kind: str, folder: Path) -> None:
    damage, file, cure = BROKEN[kind]
    damage(folder)
    report = report_of(folder)

    (problem,) = report.problems
    assert problem.startswith("IMG2IMG_MODEL: ")
    assert file in problem
    assert cure in problem
    assert list(report.lines())[-1] == "a worker would not start"


def test_a_size_and_a_number_format_that_do_not_run_are_named(folder: Path, tmp_path: Path) -> None:
    (problem,) = report_of(folder, warm_up_sizes="3x3").problems
    assert problem == "IMG2IMG_WARM_UP_SIZES: 3x3: model needs sides divisible by 8"
    flux = models()["flux dev"].write(tmp_path / "flux")
    (problem,) = report_of(flux, dtype="float16").problems
    assert problem.startswith("IMG2IMG_DTYPE: ")


async def test_the_command_prints_json_without_a_stack_trace(folder: Path) -> None:
    cut(folder)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "img2img_server", "doctor", "--json"),
        env={**clean, "IMG2IMG_MODEL": str(folder), "IMG2IMG_DEVICE": "cpu"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, logged = await process.communicate()

    report = json.loads(said)
    assert (process.returncode, report["ok"]) == (1, False)
    assert "is cut off" in report["problems"][0]
    assert b"Traceback" not in logged
