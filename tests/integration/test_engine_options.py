"""Options for speed and memory do not change images, or only within their documented limit."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SanaTransformer2DModel, UNet2DConditionModel
from torch._inductor import config as inductor

from img2img_server.domain.job import Determinism
from img2img_server.engine.base import EngineJob, JobFailed, PreviewReady
from img2img_server.engine.denoiser import Conditioning
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.load import accelerate
from img2img_server.engine.executor import BatchExecutor
from img2img_server.engine.family import ModelError
from img2img_server.engine.load import load_engine
from img2img_server.engine.memory import MemoryModel, NoProbe
from img2img_server.engine.model_spec import ModelSpec, read_model_spec
from img2img_server.engine.options import Compile, EngineOptions, ModelOptions, TinyVaeUse
from img2img_server.engine.step_loop import admit
from img2img_server.errors import OutOfMemoryError
from img2img_server.imaging.base import Pixels
from img2img_server.settings import Settings
from tests.engine_bench import BOUND, ReplyInbox, blocks, difference, images, job, run, running
from tests.oracle.harness import families, models
from tests.tiny_models import write_sd

WANTED = job(guidance_scale=4.0, seeds=(1, 2, 3), num_inference_steps=5, preview_interval_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sd(tmp_path_factory.mktemp("tiny"), tiny_vae=True) / "vae")


def load(folder: Path, options: ModelOptions | None = None) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(str(folder), torch.device("cpu"), torch.float32, options)


def made(denoiser: DiffusersDenoiser, wanted: EngineJob = WANTED) -> list[Pixels]:
    with running(denoiser) as engine:
        return images(run(engine, wanted))


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[Pixels]:
    return made(load(folder))


def worst(found: Sequence[Pixels], expected: Sequence[Pixels]) -> int:
    return max(difference(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", [{"channels_last": False}, {"fuse_qkv": True}], ids=str)
def test_a_speed_switch_changes_no_image(
    folder: Path, plain: list[Pixels], options: dict[str, bool]
) -> None:
    assert worst(made(load(folder, ModelOptions(**options))), plain) <= BOUND


@pytest.mark.parametrize("how", ["regional", "whole"])
def test_a_compiled_model_sees_few_batch_sizes_and_makes_the_same_images(
    folder: Path, plain: list[Pixels], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real compiler would take a minute. The test is about the model's calls.
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(compile_module, backend="eager")
    )
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    batches: list[int] = []
    forward = UNet2DConditionModel.forward

    @functools.wraps(forward)
    def noting(self: Any, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        batches.append(len(sample))
        return forward(self, sample, *arguments, **options)

    denoiser = load(folder, ModelOptions(compile=Compile(how)))
    network = denoiser._model.network
    if how == "regional":
        monkeypatch.setattr(network, "forward", functools.partial(noting, network))
        found = made(denoiser)
        assert set(batches) <= {1, 2, 4, 8}
        assert max(batches) == 8, "six forwards are filled up"
    else:
        found = made(denoiser)

    assert worst(found, plain) <= BOUND
    assert denoiser.warm_up_forwards == (1, 2, 4, 8)


def test_regional_compilation_finds_the_blocks_of_networks_that_name_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **_: compiled.append(type(self).__name__)
    )
    size = {"num_attention_heads": 1, "num_cross_attention_heads": 1, "cross_attention_dim": 32}
    network = SanaTransformer2DModel(num_layers=2, caption_channels=8, **size)  # type: ignore[no-untyped-call]

    accelerate(network, ModelOptions(compile=Compile.REGIONAL))

    assert compiled == ["SanaTransformerBlock"] * 2


def test_a_network_without_fused_projections_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear cannot fuse its projections") as caught:
        accelerate(torch.nn.Linear(1, 1), ModelOptions(fuse_qkv=True))

    assert caught.value.setting == "fuse_qkv"


@pytest.mark.parametrize("how", ["regional", "whole"])
def test_a_machine_that_cannot_compile_is_reported_so_at_the_start(
    folder: Path, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    no_compiler = {"cpp.cxx": (str(tmp_path / "none"),)}
    sentence = rf"{how} needs a C\+\+ compiler on this machine .* must be off: "
    with inductor.patch(no_compiler), pytest.raises(ModelError, match=sentence):
        load(folder, ModelOptions(compile=Compile(how)))


def test_an_image_beyond_the_limit_passes_the_autoencoder_in_tiles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiled: list[tuple[int, ...]] = []
    real = AutoencoderKL.tiled_decode

    def noting(self: Any, z: torch.Tensor, return_dict: bool = True) -> Any:
        tiled.append(tuple(z.shape[2:]))
        return real(self, z, return_dict)

    monkeypatch.setattr(AutoencoderKL, "tiled_decode", noting)
    denoiser = load(folder, ModelOptions(vae_tile_pixels=128 * 128))
    large = made(denoiser, job(init_image=blocks(160, 136)))
    small = made(denoiser, job(init_image=blocks(128, 128)))

    assert [image.shape for image in (*large, *small)] == [(160, 136, 3), (128, 128, 3)]
    assert tiled == [(20, 17)], "the smaller one passes whole"


def test_an_image_that_does_not_fit_whole_is_decoded_in_tiles(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load(folder)
    tries: list[bool] = []
    vae = denoiser._codec._vae
    decode = vae.decode

    def small_device(latents: torch.Tensor) -> Any:
        tries.append(vae.use_tiling)
        if not vae.use_tiling:
            raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB.")
        return decode(latents)

    monkeypatch.setattr(vae, "decode", small_device)
    for _ in range(2):
        assert made(denoiser, job(init_image=blocks(128, 128)))[0].shape == (128, 128, 3)

    assert tries == [False, True, True], "it does not retry without a chance"


def test_what_does_not_fit_in_tiles_either_fails_the_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load(folder)

    def no_memory(latents: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 2.50 GiB.")

    monkeypatch.setattr(denoiser._codec._vae, "decode", no_memory)
    with running(denoiser) as engine:
        end = run(engine, job())[-1]

    assert isinstance(end, JobFailed)
    assert "needs about 2560 MiB" in str(end.error)


def test_a_tiny_autoencoder_makes_the_previews(
    folder: Path, plain: list[Pixels], tiny_vae: str
) -> None:
    denoiser = load(folder, ModelOptions(tiny_vae=tiny_vae))
    inbox = ReplyInbox()
    with running(denoiser) as engine:
        engine.submit(WANTED, inbox)
        events = inbox.all()

    previews = [event.pixels for event in events if isinstance(event, PreviewReady)]
    linear = load(folder).preview(torch.zeros(1, 4, 8, 9))
    assert {preview.shape for preview in previews} == {(64, 72, 3)}
    assert worst(images(events), plain) <= BOUND, "the images are those of the large one"
    tiny = denoiser.preview(torch.zeros(1, 4, 8, 9))
    assert not np.array_equal(tiny[0].pixels(), linear[0].pixels())


def test_an_overwritten_tiny_autoencoder_does_not_change_previews(
    folder: Path, tiny_vae: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_vae, tmp_path / "tiny")
    latents = torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(0))
    (expected,) = load(folder, ModelOptions(tiny_vae=tiny_vae)).preview(latents)
    denoiser = load(folder, ModelOptions(tiny_vae=str(copy)))

    (file,) = copy.glob("*.safetensors")
    with file.open("r+b") as opened:  # as `rsync --inplace` does
        opened.write(bytes(file.stat().st_size))

    (found,) = denoiser.preview(latents)
    assert difference(found.pixels(), expected.pixels()) <= BOUND


def test_a_preview_of_a_large_image_is_small(folder: Path, tiny_vae: str) -> None:
    denoiser = load(folder, ModelOptions(tiny_vae=tiny_vae))

    (preview,) = denoiser.preview(torch.zeros(1, 4, 64, 32))
    assert preview.pixels().shape == (256, 128, 3)


def test_a_tiny_autoencoder_makes_the_images_when_requested(folder: Path, tiny_vae: str) -> None:
    options = ModelOptions(tiny_vae=tiny_vae, tiny_vae_use=TinyVaeUse.IMAGES)
    mixed, whole = load(folder, options), load(Path(tiny_vae).parent)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    (one,), (other,) = mixed.decode(latents), whole.decode(latents)
    assert difference(one.pixels(), other.pixels()) == 0


def test_only_what_tests_hold_is_promised_with_a_bound(folder: Path) -> None:
    cpu = torch.device("cpu")
    promised = {
        dtype: DiffusersDenoiser.load(str(folder), cpu, dtype).determinism
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert promised == {
        torch.float32: Determinism.BOUNDED,
        torch.bfloat16: Determinism.CLOSE,
    }


def test_prompts_of_jobs_that_begin_together_are_encoded_in_one_batch(folder: Path) -> None:
    denoiser, batches = load(folder), list[int]()
    encoder = denoiser._model.pipeline.text_encoder
    encoder.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    spec, memory = ModelSpec(source="", name="tiny"), MemoryModel(NoProbe())
    wanted = [job(job_id=n, prompt=f"prompt {n}", guidance_scale=4.0) for n in (1, 2, 3)]
    runs = [admit(one, print, denoiser, spec, memory) for one in wanted]
    stages = BatchExecutor(denoiser, print)

    stages.prefetch_prompts(runs)
    for one in runs:
        assert stages.encode([one]) == []
    assert batches == [4], "three prompts, and the negative one that they share"


def test_a_tiny_autoencoder_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot load"):
        load(folder, ModelOptions(tiny_vae="/nowhere"))


def test_announced_sizes_run_before_the_worker_is_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[int, ...]] = []
    denoise = DiffusersDenoiser.denoise

    def noting(self: Any, latents: Sequence[torch.Tensor], *arguments: Any) -> Any:
        seen.append((len(latents), *latents[0].shape[1:]))
        return denoise(self, latents, *arguments)

    monkeypatch.setattr(DiffusersDenoiser, "denoise", noting)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    settings = Settings(
        model=str(folder), warm_up_sizes="64x72, 128x64", compile_cache_dir=tmp_path
    )
    load_engine(EngineOptions.of(settings)).stop()

    assert seen == [(1, 4, 9, 8), (1, 4, 8, 16)]


def test_a_size_that_does_not_run_is_reported_at_the_start(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"3x3: .* needs sides divisible by 8"):
        load_engine(EngineOptions.of(Settings(model=str(folder), warm_up_sizes="3x3")))


class SmallDevice(DiffusersDenoiser):
    """A memory probe by which every forward of 64x72 needs 100 MiB and three of them fit."""

    free: int | None = 330 * 2**20

    def start(self) -> None:
        self.last_batch = 0
        self.batches: list[int] = getattr(self, "batches", [])

    def denoise(
        self,
        latents: Sequence[torch.Tensor],
        timesteps: torch.Tensor,
        conditionings: Sequence[Conditioning],
    ) -> Sequence[torch.Tensor]:
        self.last_batch = sum(1 if row.negative is None else 2 for row in conditionings)
        self.batches.append(self.last_batch)
        return super().denoise(latents, timesteps, conditionings)

    def peak(self) -> int:
        return self.last_batch * 100 * 2**20


def test_batches_and_jobs_are_held_against_the_peaks_that_were_measured(
    folder: Path, plain: list[Pixels]
) -> None:
    device = SmallDevice.load(str(folder), torch.device("cpu"), torch.float32)
    with running(device, memory=MemoryModel(device)) as engine:
        assert len(images(run(engine, job()))) == 1
        assert worst(images(run(engine, WANTED)), plain) <= BOUND
        (end,) = run(engine, job(init_image=blocks(128, 144)))

    assert max(device.batches) == 2, "a guided row takes two; two of them would take four"
    assert isinstance(end, JobFailed)
    assert isinstance(end.error, OutOfMemoryError)
    assert (end.error.width, end.error.needed_bytes) == (144, 400 * 2**20)


@pytest.mark.parametrize("family", families())
def test_fused_projections_give_the_same_images_or_are_refused(family: str, tmp_path: Path) -> None:
    model = next(iter(families()[family].values()))
    folder = model.write(tmp_path)
    wanted = job(
        scheduler=read_model_spec(str(folder)).scheduler,
        init_image=blocks(*model.sizes[0]),
        guidance_scale=model.guidance_scales[-1],
        strength=0.9,
        **model.options,
    )
    try:
        fused = load(folder, ModelOptions(fuse_qkv=True))
    except ModelError:
        return
    assert worst(made(fused, wanted), made(load(folder), wanted)) <= BOUND


def test_stable_diffusion_3_refuses_fused_projections(tmp_path: Path) -> None:
    folder = models()["sd3.5"].write(tmp_path)
    with pytest.raises(ModelError, match="cannot fuse its projections, so the setting must be off"):
        load(folder, ModelOptions(fuse_qkv=True))
