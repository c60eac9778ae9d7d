"""LoRAs by request: images have the changed weights only in requests with the LoRA."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from img2img_server.domain.params import Lora
from img2img_server.engine import engine as engine_module
from img2img_server.engine.base import (
    RESTARTED_WARNING,
    EngineJob,
    JobDone,
    JobFailed,
    JobStopped,
    JobSuspended,
)
from img2img_server.engine.denoiser import Adapter, Conditioning
from img2img_server.engine.diffusers import denoiser as denoiser_module
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import families as served
from img2img_server.engine.diffusers.lora_forms import Change
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions, ModelOptions
from img2img_server.engine.step_loop import StepLoop
from img2img_server.imaging.base import Pixels
from img2img_server.settings import Settings
from tests.engine_bench import (
    BOUND,
    SECONDS,
    ReplyInbox,
    Stock,
    blocks,
    difference,
    images,
    job,
    run,
    running,
    stock_call,
)
from tests.oracle.harness import families
from tests.tiny_models import write_sd, write_sdxl

RANK = 2
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
LANGUAGE_MODEL = ("text_encoder", "layers.0.self_attn.v_proj")
UNET = (("unet", LINEAR), ("unet", OUT), ("unet", CONVOLUTION), ("text_encoder", TEXT))
# Names of weights in models with a transformer, by family.
TRANSFORMERS = {
    "flux": (
        ("transformer", "single_transformer_blocks.1.proj_mlp"),
        ("transformer", "transformer_blocks.1.attn.add_k_proj"),
        ("text_encoder", TEXT),
        ("text_encoder_2", T5),
    ),
    "chroma": (("transformer", "transformer_blocks.0.attn.to_q"), ("text_encoder", T5)),
    "sd3": (
        ("transformer", "transformer_blocks.1.attn.to_q"),
        ("text_encoder", TEXT),
        ("text_encoder_2", TEXT),
        ("text_encoder_3", T5),
    ),
    "z_image": (
        ("transformer", "layers.1.attention.to_v"),
        ("transformer", "layers.0.feed_forward.w1"),
        LANGUAGE_MODEL,
    ),
    "qwen_image": (
        ("transformer", "transformer_blocks.1.attn.add_q_proj"),
        ("transformer", "transformer_blocks.0.img_mlp.net.2"),
        LANGUAGE_MODEL,
    ),
    "sana_sprint": (("transformer", "transformer_blocks.1.attn2.to_v"), LANGUAGE_MODEL),
    "krea2": (("transformer", "transformer_blocks.1.attn.to_v"), LANGUAGE_MODEL),
    "ernie_image": (("transformer", "layers.1.self_attention.to_v"), LANGUAGE_MODEL),
    "lumina2": (("transformer", "layers.1.attn.to_v"), LANGUAGE_MODEL),
    "kolors": (("unet", LINEAR), ("unet", OUT)),
}
SCHEDULERS = {family.name: family.default_scheduler for family in served()}
WANTED: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.9}


class Written:
    """A model, LoRA files for it, and the stock pipeline with the changed weights."""

    def __init__(
        self,
        folder: Path,
        write: Any,
        weights: Sequence[tuple[str, str]] = UNET,
        call: Callable[[EngineJob], dict[str, Any]] = stock_call,
    ) -> None:
        self.model: Path = write(folder / "model")
        self.loras = folder / "loras"
        self.loras.mkdir()
        self._weights = weights
        self._stock = Stock(self.model, call)
        self._factors: dict[str, list[tuple[Tensor, Tensor, Tensor, float]]] = {}

    def add(self, name: str, form: str, alpha: float) -> None:
        """`form`: how the file spells its keys, as the tools peft and kohya write them."""
        generator = torch.Generator().manual_seed(len(self._factors))
        pipeline, file, factors = self._stock._pipeline, {}, []
        for part, module in self._weights:
            weight = _find(getattr(pipeline, part), module).weight.data
            down = torch.randn((RANK, *weight.shape[1:]), generator=generator)
            up = torch.randn((weight.shape[0], RANK), generator=generator)
            if weight.ndim == 4:
                up = up[:, :, None, None]
            spelt = f"text_model.{module}" if module == TEXT else module
            if form == "peft":
                file[f"{part}.{spelt}.lora_A.weight"] = down
                file[f"{part}.{spelt}.lora_B.weight"] = up
                if alpha != RANK:
                    file[f"{part}.{spelt}.alpha"] = torch.tensor(alpha)
            else:
                prefix = "lora_unet_" if part == "unet" else "lora_te_"
                key = prefix + spelt.replace(".", "_")
                file[f"{key}.lora_down.weight"] = down
                file[f"{key}.lora_up.weight"] = up
                file[f"{key}.alpha"] = torch.tensor(alpha)
            factors.append((weight, down, up, alpha / RANK))
        self._factors[name] = factors
        save_file(file, self.loras / f"{name}.safetensors")

    def expected(self, wanted: EngineJob) -> Pixels:
        """Returns the image of diffusers with the changed weights."""
        before = []
        for lora in wanted.params.loras:
            for weight, down, up, factor in self._factors[lora.name]:
                before.append((weight, weight.clone()))
                product = torch.einsum("or,ri...->oi...", up.reshape(len(up), RANK), down)
                weight += lora.scale * factor * product
        (image,) = self._stock.images(wanted)
        for weight, old in reversed(before):
            weight.copy_(old)
        return image


def _find(network: Any, name: str) -> Any:
    return next(module for path, module in network.named_modules() if path.endswith(name))


@pytest.fixture(scope="module", params=[write_sd, write_sdxl], ids=["sd", "sdxl"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    found = Written(tmp_path_factory.mktemp("lora"), request.param)
    found.add("ink", "peft", alpha=RANK)
    if request.param is write_sd:  # The UNet of SDXL needs all of its real blocks for this format.
        found.add("oil", "kohya", alpha=1.0)
    return found


def named(name: str, scale: float = 1.0) -> tuple[Lora, ...]:
    return (Lora(name, scale),) if name else ()


def load(written: Written) -> DiffusersDenoiser:
    options = ModelOptions(lora_dir=written.loras)
    return DiffusersDenoiser.load(str(written.model), torch.device("cpu"), torch.float32, options)


def test_an_image_with_a_lora_is_the_one_of_the_changed_weights(written: Written) -> None:
    denoiser = load(written)
    wanted = [
        job(job_id=place, loras=named(lora, scale), **WANTED)
        for place, (lora, scale) in enumerate(
            (name, scale) for name in ("", *denoiser.loras, "") for scale in (1.0, 0.5)
        )
    ]
    with running(denoiser, loras=denoiser.loras) as engine:
        found = [images(run(engine, each))[0] for each in wanted]

    expected = [written.expected(each) for each in wanted]
    assert [difference(a, b) for a, b in zip(found, expected, strict=True)] <= [BOUND] * len(found)
    assert difference(expected[0], expected[2]) > 2 * BOUND, "it does change the image"
    assert difference(found[0], found[-1]) == 0, "and nothing of it stays"


@pytest.mark.parametrize("written", [write_sd], indirect=True, ids=["sd"])
@pytest.mark.parametrize("most_work", [0.0, 9.0], ids=["in-the-weights", "next-to-the-layers"])
def test_a_negative_scale_subtracts_the_change(
    written: Written, most_work: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser_module, "most_branch_work", lambda *_, **__: most_work)
    denoiser = load(written)
    wanted = [job(loras=named("oil", scale), **WANTED) for scale in (1.0, -1.0, -0.5)]
    wanted.append(job(loras=(Lora("ink", -1.0), Lora("oil", 0.5)), **WANTED))
    with running(denoiser, loras=denoiser.loras) as engine:
        found = [images(run(engine, each))[0] for each in wanted]

    expected = [written.expected(each) for each in wanted]
    assert max(map(difference, found, expected)) <= BOUND
    assert min(map(difference, found, found[1:])) > 2 * BOUND, "the sign has an effect"
    assert bool(denoiser._denoiser_loras._weights._kept) is not bool(most_work)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_lora_of_a_transformer_changes_its_image(family: str, tmp_path: Path) -> None:
    model = next(iter(families()[family].values()))
    written = Written(tmp_path, model.write, TRANSFORMERS[family], model.call)
    written.add("ink", "peft", alpha=1.0)
    image, scheduler = blocks(*model.sizes[0]), SCHEDULERS[family]
    wanted = [
        job(job_id=place, loras=named(lora), scheduler=scheduler, init_image=image, **WANTED)
        for place, lora in enumerate(("", "ink", ""))
    ]
    with running(load(written), loras=("ink",)) as engine:
        found = [images(run(engine, each))[0] for each in wanted]

    expected = [written.expected(each) for each in wanted]
    assert max(map(difference, found, expected)) <= BOUND
    assert difference(expected[0], expected[1]) > 2 * BOUND, "it does change the image"
    assert difference(found[0], found[2]) == 0, "and nothing of it stays"


@pytest.mark.parametrize("written", [write_sd], indirect=True, ids=["sd"])
def test_several_loras_add_their_changes_in_any_order(written: Written) -> None:
    both = Lora("ink", 0.5), Lora("oil", 0.8)
    wanted = [
        job(loras=both, **WANTED),
        job(loras=both[::-1], **WANTED),
        job(loras=(*both[:1], Lora("oil", 0.0)), **WANTED),
        job(loras=both[:1], **WANTED),
        job(loras=both[1:], **WANTED),
    ]
    denoiser = load(written)
    with running(denoiser, loras=denoiser.loras) as engine:
        found = [images(run(engine, each))[0] for each in wanted]

    expected = [written.expected(each) for each in wanted]
    assert max(map(difference, found, expected)) <= BOUND
    assert difference(found[0], found[1]) == 0, "the order has no effect"
    assert difference(found[2], found[3]) == 0, "a LoRA with the scale 0 has none"
    assert min(difference(found[0], each) for each in found[3:]) > 2 * BOUND, "both have an effect"


def test_neighbours_with_other_loras_change_nothing(written: Written) -> None:
    denoiser = load(written)
    wanted = [
        job(job_id=place, loras=named(lora), seeds=(place,), **WANTED)
        for place, lora in enumerate(["", *denoiser.loras, "", *denoiser.loras])
    ]
    inboxes = [ReplyInbox() for _ in wanted]
    with running(denoiser, loras=denoiser.loras) as engine:
        for each, inbox in zip(wanted, inboxes, strict=True):
            engine.submit(each, inbox)
        found = [images(inbox.all())[0] for inbox in inboxes]

    expected = [written.expected(each) for each in wanted]
    assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) <= BOUND


def test_of_a_lora_that_was_written_in_half_nothing_stays(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, inked = job(**WANTED), job(loras=named("ink"), **WANTED)
    untouched, denoiser = load(written), load(written)
    for each in (untouched, denoiser):
        each._denoiser_loras._most_work = 0.0
    with running(untouched, loras=untouched.loras) as engine:
        expected = [images(run(engine, each))[0] for each in (plain, inked)]

    written_weights = 0

    def delta(change: Change, original: Tensor, scale: float) -> Tensor:
        nonlocal written_weights
        if written_weights == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        written_weights += 1
        return whole_delta(change, original, scale)

    whole_delta = Change.delta
    with running(denoiser, loras=denoiser.loras) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(Change, "delta", delta)
            end = run(engine, inked)[-1]
        found = [images(run(engine, each))[0] for each in (plain, inked)]

    assert (type(end), written_weights) == (JobFailed, 2)
    assert [difference(a, b) for a, b in zip(found, expected, strict=True)] == [0, 0]
    assert difference(expected[0], expected[1]) > 2 * BOUND, "it does change the image"


def test_the_model_announces_its_loras_by_their_files_names(written: Written) -> None:
    settings = Settings(model=str(written.model), lora_dir=written.loras, warm_up_sizes="64x64")
    engine = load_engine(EngineOptions.of(settings))
    try:
        assert engine.model.loras == tuple(sorted(written._factors))
        assert isinstance(run(engine, job(loras=named("ink")))[-1], JobDone)
        (end,) = run(engine, job(loras=named("oil paint")))
    finally:
        engine.stop()

    assert isinstance(end, JobFailed)
    assert str(end.error) == "model has no LoRA oil paint"


def test_a_file_that_arrives_while_the_engine_runs_is_offered(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "LORA_WATCH_SECONDS", 0.01)
    changed = threading.Event()
    set_loras = StepLoop.set_loras

    def noted(loop: StepLoop, names: tuple[str, ...]) -> None:
        set_loras(loop, names)
        if names:
            changed.set()

    monkeypatch.setattr(StepLoop, "set_loras", noted)
    settings = Settings(model=str(written.model), lora_dir=tmp_path, warm_up_sizes="64x64")
    engine = load_engine(EngineOptions.of(settings))
    try:
        before = engine.model.loras
        (tmp_path / "foreign.safetensors").write_text("<html></html>")
        shutil.copy(written.loras / "ink.safetensors", tmp_path)
        assert changed.wait(SECONDS)
        wanted = job(loras=named("ink"), **WANTED)
        (image,) = images(run(engine, wanted))
    finally:
        engine.stop()

    assert (before, engine.model.loras) == ((), ("ink",))
    ((name, reason),) = engine.model.refused_loras
    assert name == "foreign"
    assert reason.startswith("it is an HTML or XML page instead of the weights")
    assert difference(image, written.expected(wanted)) <= BOUND


class Replacing(DiffusersDenoiser):
    """The real denoiser, which calls a function before its third step. It records the adapters of
    each step.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.before_third: Callable[[], None] = lambda: None
        self.adapters: list[list[tuple[Adapter, ...]]] = []

    def denoise(
        self, latents: Sequence[Tensor], timesteps: Tensor, conditionings: Sequence[Conditioning]
    ) -> Sequence[Tensor]:
        self.adapters.append([each.adapters for each in conditionings])
        if len(self.adapters) == 3:
            self.before_third()
        return super().denoise(latents, timesteps, conditionings)


@pytest.fixture
def replacing(written: Written, tmp_path: Path) -> Replacing:
    """A denoiser whose folder of LoRAs has a copy of `ink`."""
    shutil.copy(written.loras / "ink.safetensors", tmp_path)
    options = ModelOptions(lora_dir=tmp_path)
    cpu = torch.device("cpu")
    return Replacing.load(str(written.model), cpu, torch.float32, options)


def replace_ink(written: Written, folder: Path) -> None:
    """Replaces the LoRA `ink` by one of half its size."""
    tensors = load_file(written.loras / "ink.safetensors")
    halves = {key: it / 2 if key.endswith("lora_B.weight") else it for key, it in tensors.items()}
    save_file(halves, folder / ".new")
    (folder / ".new").rename(folder / "ink.safetensors")


@pytest.mark.parametrize("is_deleted", [False, True], ids=["replaced", "deleted"])
def test_a_running_job_keeps_the_lora_that_it_began_with(
    written: Written, replacing: Replacing, tmp_path: Path, is_deleted: bool
) -> None:
    first = job(job_id=1, loras=named("ink"), **WANTED | {"num_inference_steps": 6})
    later = job(job_id=2, loras=named("ink"), **WANTED | {"num_inference_steps": 6})
    inboxes = ReplyInbox(), ReplyInbox()

    with running(replacing, loras=("ink",)) as engine:

        def change() -> None:
            if is_deleted:
                (tmp_path / "ink.safetensors").unlink()
            else:
                replace_ink(written, tmp_path)
            changes = [replacing.refresh_loras(), replacing.refresh_loras()]
            assert any(changes)
            engine.submit(later, inboxes[1])

        replacing.before_third = change
        engine.submit(first, inboxes[0])
        found = images(inboxes[0].all())[0]
        end = inboxes[1].all()

    assert difference(found, written.expected(first)) <= BOUND
    if is_deleted:
        assert isinstance(end[-1], JobFailed)
        assert str(end[-1].error) == "the LoRA ink was removed"
    else:
        half = job(loras=named("ink", 0.5), **WANTED | {"num_inference_steps": 6})
        assert difference(images(end)[0], written.expected(half)) <= BOUND
        assert difference(images(end)[0], found) > 2 * BOUND, "the files differ"


def test_a_job_whose_lora_was_replaced_is_suspended_without_a_state(
    written: Written, replacing: Replacing, tmp_path: Path
) -> None:
    wanted = job(loras=named("ink"), **WANTED | {"num_inference_steps": 6})

    def suspended(change: Callable[[], None]) -> object:
        replacing.adapters.clear()

        def change_and_suspend() -> None:
            change()
            engine.suspend(wanted.job_id)

        replacing.before_third = change_and_suspend
        return run(engine, wanted)[-1]

    def change() -> None:
        replace_ink(written, tmp_path)
        assert [replacing.refresh_loras(), replacing.refresh_loras()] == [False, True]

    with running(replacing, loras=("ink",)) as engine:
        before = suspended(lambda: None)
        assert isinstance(before, JobSuspended)
        assert isinstance(suspended(change), JobStopped)
        replacing.before_third = lambda: None
        again = run(engine, replace(wanted, state=before.state))[-1]

    assert isinstance(again, JobDone)
    assert again.warnings == (RESTARTED_WARNING,), "its steps are those of another file"


def test_fused_products_and_loras_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="IMG2IMG_LORA_DIR: does not work with IMG2IMG_FUSE_QKV"):
        Settings(lora_dir=tmp_path, fuse_qkv=True)
