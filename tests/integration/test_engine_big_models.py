"""Options for models that are large for their machine: where parts are kept, and in what form."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from img2img_server.domain.models import ModelKind
from img2img_server.engine.base import EngineJob
from img2img_server.engine.diffusers import file_pages
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import families
from img2img_server.engine.diffusers.file_pages import (
    FileMaps,
    drop_file_pages,
    file_maps,
    leave_files,
    use_channels_last,
)
from img2img_server.engine.diffusers.placement import (
    TextEncoderOffload,
    bytes_of,
    modules,
    offload_groups,
)
from img2img_server.engine.family import ModelError
from img2img_server.engine.options import (
    ModelOptions,
    Quantization,
    TextEncoderPlacement,
)
from img2img_server.imaging.base import Pixels
from img2img_server.setting_names import variable
from img2img_server.settings import Settings
from tests.engine_bench import blocks, images, job, run, running
from tests.oracle.harness import models
from tests.tiny_models import write_sd

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models()["flux schnell"].write(tmp_path_factory.mktemp("flux"))


def load(folder: Path, **options: Any) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(str(folder), CPU, torch.float32, ModelOptions(**options))


def flux_job(**changes: Any) -> EngineJob:
    """Returns a job whose size suits models of the FLUX.1 kind."""
    given = {"scheduler": "flow_match_euler", "guidance_scale": 0.0, "init_image": blocks(64, 80)}
    return job(**given, **changes)


def image(denoiser: DiffusersDenoiser, **changes: Any) -> Pixels:
    wanted = flux_job(strength=0.8, **changes)
    with running(denoiser) as engine:
        return images(run(engine, wanted))[0]


def difference(one: Pixels, other: Pixels) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.fixture
def texts_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns one entry for each move of text encoders to their device."""
    seen = list[int]()
    moved = TextEncoderOffload._on_device

    def counting(self: TextEncoderOffload) -> Any:
        seen.append(1)
        return moved(self)

    monkeypatch.setattr(TextEncoderOffload, "_on_device", counting)
    return seen


@pytest.mark.parametrize("placement", TextEncoderPlacement)
def test_the_place_of_the_text_encoders_does_not_change_an_image(
    flux: Path, placement: TextEncoderPlacement
) -> None:
    assert difference(image(load(flux, text_encoder_placement=placement)), image(load(flux))) == 0


def test_text_encoders_move_for_new_prompts_only(flux: Path, texts_seen: list[int]) -> None:
    denoiser = load(flux, text_encoder_placement=TextEncoderPlacement.OFFLOAD)
    with running(denoiser) as engine:
        for number, prompt in enumerate(("a boat", "a boat", "a tree", "a boat")):
            images(run(engine, flux_job(job_id=number, prompt=prompt)))

    assert len(texts_seen) == 2


def test_offloaded_text_encoders_have_their_own_weights_again_after_a_failure(flux: Path) -> None:
    pipeline = load(flux)._model.pipeline
    weight = pipeline.text_encoder.get_input_embeddings().weight
    address = weight.data_ptr()
    offload = TextEncoderOffload(pipeline, CPU, TextEncoderPlacement.OFFLOAD)

    def fail() -> None:
        with offload.running():
            # The clone replaces the copy on the device.
            weight.data = weight.data.clone()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()

    assert weight.data_ptr() == address


def test_a_denoiser_whose_blocks_are_offloaded_gives_the_same_image(flux: Path) -> None:
    plain = image(load(flux))
    denoiser = load(flux)
    offload_groups(denoiser._model.network, CPU)

    assert difference(image(denoiser), plain) == 0


def test_group_offload_without_a_gpu_is_refused(flux: Path) -> None:
    with pytest.raises(ModelError, match="no GPU") as found:
        load(flux, group_offload=True)

    assert found.value.setting == "group_offload"


@pytest.mark.parametrize(("form", "share"), [(Quantization.INT8, 0.5), (Quantization.FP8, 0.5)])
def test_quantised_weights_are_smaller_and_the_image_is_similar(
    flux: Path, form: Quantization, share: float
) -> None:
    pytest.importorskip("torchao")
    plain, small = load(flux), load(flux, quantization=form)

    assert _bytes(small) < share * _bytes(plain)
    assert np.abs(image(small).astype(int) - image(plain).astype(int)).mean() < 4


def test_quantised_unets_run_channels_last(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder = write_sd(tmp_path / "sd")
    denoiser = load(folder, quantization=Quantization.INT8)
    with running(denoiser) as engine:
        assert len(images(run(engine, job()))) == 1


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.FP8])
def test_a_missing_package_is_named(
    flux: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ModelError, match="needs the package torchao") as found:
        load(flux, quantization=quantization)

    assert found.value.setting == "quantization"


def test_a_gguf_file_replaces_the_weights_of_the_denoiser(flux: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weights = load_file(next((flux / "transformer").glob("*.safetensors")))
    file = tmp_path / "denoiser.gguf"
    writer = gguf.GGUFWriter(str(file), "flux")
    for name, tensor in weights.items():
        value = tensor.numpy()
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    plain, small = load(flux), load(flux, gguf_file=file)

    assert _bytes(small) < _bytes(plain)
    assert np.abs(image(small).astype(int) - image(plain).astype(int)).mean() < 4


def test_a_gguf_file_that_is_none_is_refused(flux: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "denoiser.gguf"
    file.write_bytes(b"no weights")

    with pytest.raises(ModelError, match="cannot load") as found:
        load(flux, gguf_file=file)

    assert found.value.setting == "gguf_file"


def test_float16_is_refused_for_models_that_overflow_in_it(flux: Path) -> None:
    with pytest.raises(ModelError, match="overflow in float16") as found:
        DiffusersDenoiser.load(str(flux), CPU, torch.float16)

    assert found.value.setting == "dtype"
    flows = [family for family in families() if family.kind is ModelKind.FLOW]
    assert [family.name for family in flows if family.takes_float16] == ["sd3"]


def test_the_memory_of_each_part_is_logged(flux: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(flux)

    lines = [line for line in caplog.messages if line.startswith("model_part_placed: ")]
    assert {line.split()[1].rstrip(":") for line in lines} == {
        "text_encoder",
        "text_encoder_2",
        "transformer",
        "vae",
    }
    assert all(line.endswith(" MiB on cpu as float32") for line in lines)


def test_weights_that_are_copied_leave_the_memory_of_their_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {str(i): torch.randn(1024, 1024, 2, 2) for i in range(4)}  # 16 MiB each
    expected = {name: value.clone() for name, value in weights.items()}
    save_file(weights, tmp_path / "weights.safetensors")
    del weights
    network = torch.nn.Module()
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        network.register_buffer("w" + name, value)
    before = psutil.Process().memory_info()

    use_channels_last(network)

    after = psutil.Process().memory_info()
    for name, value in expected.items():
        assert torch.equal(network.get_buffer("w" + name), value)
        assert network.get_buffer("w" + name).is_contiguous(memory_format=torch.channels_last)
    assert after.shared - before.shared < 16 * 2**20


@pytest.mark.parametrize("move", [leave_files, use_channels_last])
def test_the_maps_of_the_process_are_read_once_for_all_weights(
    move: Callable[[torch.nn.Module], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {str(i): torch.full((32, 32, 3, 3), float(i)) for i in range(8)}
    save_file(weights, tmp_path / "weights.safetensors")
    network = torch.nn.Module()
    for name, value in load_file(tmp_path / "weights.safetensors").items():
        network.register_buffer("w" + name, value)
    reads = 0

    def counted() -> FileMaps:
        nonlocal reads
        reads += 1
        return file_maps()

    monkeypatch.setattr(file_pages, "file_maps", counted)
    move(network)

    assert reads == 1
    for name, value in weights.items():
        assert torch.equal(network.get_buffer("w" + name), value)


def test_memory_that_is_no_file_is_not_given_back() -> None:
    tensor = torch.arange(2**20)

    drop_file_pages(tensor, file_maps())

    assert torch.equal(tensor, torch.arange(2**20))


@pytest.mark.parametrize(
    ("name", "other", "values"),
    [
        ("lora_dir", "group_offload", {"lora_dir": "loras", "group_offload": True}),
        ("lora_dir", "quantization", {"lora_dir": "loras", "quantization": "int8"}),
        ("gguf_file", "quantization", {"gguf_file": "a.gguf", "quantization": "fp8"}),
        ("fuse_qkv", "gguf_file", {"gguf_file": "a.gguf", "fuse_qkv": True}),
        ("group_offload", "compile", {"compile": "regional", "group_offload": True}),
    ],
)
def test_settings_that_exclude_each_other_are_refused(
    name: str, other: str, values: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=f"{variable(name)}: does not work with {variable(other)}"):
        Settings(**values)


def test_settings_that_are_off_exclude_nothing() -> None:
    assert Settings(lora_dir=Path("loras"), quantization="off")
    assert Settings(group_offload=True, compile="off")


def _bytes(denoiser: DiffusersDenoiser) -> int:
    network = modules(denoiser._model.pipeline)["transformer"]
    return sum(bytes_of(tensor.data) for tensor in network.parameters())
