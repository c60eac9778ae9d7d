"""The models of a catalogue on a real device: sizes, budgets, and memory that is returned."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from img2img_server.engine.catalogue import CatalogueModel, read_catalogue
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.family import ModelError
from img2img_server.engine.host_memory import host_memory
from img2img_server.engine.memory import MemoryModel
from img2img_server.engine.turns import DeviceTurns
from img2img_server.errors import OperatorError
from img2img_server.exit_reason import reasons_of
from img2img_server.settings import Settings
from img2img_server.worker.doctor import CatalogueReport, examine
from img2img_server.worker.load_errors import explain_load_error
from img2img_server.worker.model_loader import EngineLoader, LoadedModel, NoRoomError
from tests.tiny_models import write_sd, write_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of two models and their catalogue."""
    path = tmp_path_factory.mktemp("models")
    write_sd(path / "small")
    write_sdxl(path / "large")
    (path / "models.toml").write_text(
        '[[models]]\nsource = "small"\n[[models]]\nname = "x/large"\nsource = "large"\n'
        '[[models]]\nname = "absent"\nsource = "nowhere"\n'
    )
    return path


def models(folder: Path, **changes: Any) -> tuple[EngineLoader, tuple[CatalogueModel, ...]]:
    given = {"models_file": folder / "models.toml", **changes}
    settings = Settings(warm_up_sizes="64x64", device="cpu", safety_checker="opennsfw", **given)
    return EngineLoader(settings), read_catalogue(settings)


def device_parts(loaded: LoadedModel) -> list[weakref.ref[torch.nn.Module]]:
    engine = loaded.engine
    assert isinstance(engine, DiffusionEngine)
    denoiser: Any = engine._denoiser
    pipeline = denoiser._model.pipeline
    parts = pipeline.components.values()
    return [weakref.ref(part) for part in parts if isinstance(part, torch.nn.Module)]


async def test_the_size_of_a_model_is_known_before_it_is_loaded(folder: Path) -> None:
    loader, (small, large, _) = models(folder)
    for model in (small, large):
        found = await loader.find(model)
        loaded = await loader.load(model)
        await loader.unload(loaded)
        assert found.info.name == loaded.engine.model.name == model.name
        assert found.info == loaded.engine.model
        assert found.info.noise_levels  # for estimates of requests that wait for the load
        # Buffers of the modules, such as positions, are not in the files.
        assert 0 <= loaded.size - found.size < 0.02 * loaded.size


async def test_a_distilled_model_is_announced_with_the_defaults_that_the_engine_uses(
    folder: Path,
) -> None:
    (folder / "lcm.toml").write_text(
        '[[models]]\nname = "photo-lcm"\nsource = "small"\n'
        '[[models]]\nname = "photo"\nsource = "small"\n'
        "[[models]]\nname = 'sdxl-lightning-4step'\nsource = 'large'\n"
        "defaults.guidance_scale = 1.0\n"
    )
    loader, entries = models(folder, models_file=folder / "lcm.toml")
    seen = []
    for entry in entries:
        found = await loader.find(entry)
        loaded = await loader.load(entry)
        assert found.info == loaded.engine.model
        await loader.unload(loaded)
        steps, scale = found.info.default_num_inference_steps, found.info.default_guidance_scale
        seen.append((steps, scale, found.info.schedulers[0]))
    own = seen[1][2]
    assert seen == [(8, 1.5, "lcm"), (20, 7.5, own), (4, 1.0, own)]
    assert own != "lcm"


async def test_an_unloaded_model_leaves_nothing_in_memory(folder: Path) -> None:
    loader, (small, *_) = models(folder)
    await loader.find(small)
    before = set(threading.enumerate())
    loaded = await loader.load(small)
    parts = device_parts(loaded)
    assert len(parts) == 3
    await loader.unload(loaded)
    del loaded
    gc.disable()  # `reclaim` must not rely on a collection that happens to run.
    try:
        await loader.reclaim()
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()
    names = {thread.name for thread in threading.enumerate() if thread not in before}
    assert "engine" not in names, names


async def test_a_budget_bounds_the_weights(folder: Path) -> None:
    loader, (small, large, _) = models(folder)
    sizes = [(await loader.find(model)).size for model in (small, large)]
    loader, (small, large, _) = models(folder, models_memory_bytes=sum(sizes))
    assert loader.has_room(sizes[1], 0, sizes[0])
    assert not loader.has_room(sizes[1] + 1, 0, sizes[0])
    assert loader.has_room(sizes[1] + 1, sizes[0], sizes[0])
    loader, (small, large, _) = models(folder, models_memory_bytes=min(sizes))
    with pytest.raises(OperatorError, match="more than IMG2IMG_MODELS_MEMORY_BYTES"):
        await loader.find(large if sizes[1] > sizes[0] else small)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["host", "gpu", "cpu"],
)
async def test_a_load_without_enough_memory_is_no_broken_model(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("cannot load it") from error

    monkeypatch.setattr("img2img_server.engine.load.load_engine", fail)
    loader, (small, *_) = models(folder)
    with pytest.raises(NoRoomError):
        await loader.load(small)


async def test_a_missing_model_is_reported_without_being_loaded(folder: Path) -> None:
    loader, (*_, absent) = models(folder)
    with pytest.raises(OperatorError, match=r"there is no model at .*nowhere"):
        await loader.find(absent)


BROKEN = """
[[models]]
name = "absent"
source = "nowhere"

[[models]]
name = "sampler"
source = "small"
[models.defaults]
scheduler = "fastest"

[[models]]
name = "lora"
source = "style.safetensors"

[[models]]
name = "cut"
source = "cut.safetensors"

[[models]]
name = "part"
source = "unet.gguf"

[[models]]
name = "steps"
source = "small"
warm_up_sizes = "65x64"

[[models]]
name = "absent-gguf"
source = "small"
gguf_file = "gone.gguf"

[[models]]
name = "cut-vae"
source = "small"
vae_dir = "vae"

[[models]]
name = "good"
source = "small"
"""

# The wrong field of each entry, and a part of the sentence about it.
FAULTS = {
    "absent": ("source", "there is no model at FOLDER/nowhere"),
    "sampler": ("defaults.scheduler", "scheduler 'fastest' of FOLDER/small is not one of ddim, "),
    "lora": ("source", "FOLDER/style.safetensors is a LoRA, not a model: put it into `lora_dir`"),
    "cut": ("source", "FOLDER/cut.safetensors is cut off"),
    "part": ("source", "name it with `gguf_file`, and its base model with `source`"),
    "absent-gguf": ("gguf_file", ""),  # doctor first names a package that is missing
    "cut-vae": ("vae_dir", "FOLDER/vae/diffusion_pytorch_model.safetensors is cut off"),
    "steps": ("warm_up_sizes", "65x64: steps needs sides divisible by 8"),
}


@pytest.fixture(scope="module")
def broken(folder: Path) -> Settings:
    """Returns the settings with a catalogue of which one model can be loaded."""
    lora = {f"unet.mid.lora_{kind}.weight": torch.ones(2, 2) for kind in ("A", "B")}
    save_file(lora, folder / "style.safetensors")
    whole = (folder / "style.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-8])
    (folder / "unet.gguf").write_bytes(b"GGUF\x03\0\0\0")
    shutil.copytree(folder / "small/vae", folder / "vae")
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(whole[:-8])
    (folder / "broken.toml").write_text(BROKEN)
    return Settings(models_file=folder / "broken.toml", warm_up_sizes="64x64", device="cpu")


async def test_why_a_model_is_not_loaded_names_the_entry_and_its_field(
    folder: Path, broken: Settings
) -> None:
    """The worker announces the reason that `doctor` reports."""
    report = examine(broken)
    assert isinstance(report, CatalogueReport)
    loader = EngineLoader(broken)
    for model in read_catalogue(broken):
        problems = report.models[model.name].problems
        if model.name == "good":
            assert not problems
            continue
        with pytest.raises(OperatorError) as error:
            await loader.find(model)
        reasons = reasons_of(explain_load_error(model.settings, error.value))
        field, sentence = FAULTS[model.name]
        for found in (reasons, problems):
            (reason,) = [each.replace(str(folder), "FOLDER") for each in found]
            assert reason.startswith(f"FOLDER/broken.toml: entry {model.name}: {field}: ")
            assert sentence in reason
            assert "IMG2IMG_" not in reason


def test_a_container_limits_the_memory_of_the_machine(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    assert host_memory(meminfo, tmp_path) == (800 * 1024, 1000 * 1024)
    (tmp_path / "memory.max").write_text("500000\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert host_memory(meminfo, tmp_path) == (300_000, 500_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(meminfo, tmp_path) == (800 * 1024, 1000 * 1024)
    assert host_memory(tmp_path / "absent", tmp_path) is None


def test_steps_of_two_engines_never_overlap() -> None:
    turns, order, inside = DeviceTurns(), [], []
    barrier = threading.Barrier(2)

    def steps(name: str) -> None:
        barrier.wait()
        for _ in range(50):
            with turns.turn():
                inside.append(name)
                assert inside == [name]
                order.append(name)
                inside.remove(name)

    threads = [threading.Thread(target=steps, args=name) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(order) == 100


def test_memory_that_is_measured_while_a_model_is_loaded_does_not_count() -> None:
    class Probe:
        free = 1000

        def start(self) -> None: ...

        def peak(self) -> int:
            return 100

    turns = DeviceTurns()
    memory = MemoryModel(Probe(), turns=turns)
    with turns.loading(), memory.measured(8, 8, 1):
        pass
    assert memory.need(8, 8, 1) is None
    with memory.measured(8, 8, 1), turns.loading():
        pass
    assert memory.need(8, 8, 1) is None
    with memory.measured(8, 8, 1):
        pass
    assert memory.need(8, 8, 1) == 100


def test_doctor_examines_each_model_of_a_catalogue(folder: Path) -> None:
    report = examine(
        Settings(models_file=folder / "models.toml", warm_up_sizes="64x64", device="cpu")
    )
    assert isinstance(report, CatalogueReport)
    found = report.as_dict()
    assert not found["ok"]
    assert {name: each["ok"] for name, each in found["models"].items()} == {
        "small": True,
        "x/large": True,
        "absent": False,
    }
    lines = list(report.lines())
    assert lines[-1] == "a worker would serve 2 of 3 models"
    assert "x/large: it can be loaded" in lines
    assert any(line.startswith("absent: problem: ") and "nowhere" in line for line in lines)
