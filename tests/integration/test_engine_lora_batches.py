"""Rows with different LoRAs share batches, and each has the output of its own ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from img2img_server.domain.params import Lora
from img2img_server.engine.base import JobFailed
from img2img_server.engine.denoiser import Adapter, Conditioning, TextInput
from img2img_server.engine.diffusers import lora_branch
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.lora_layers import Part
from img2img_server.engine.diffusers.lora_use import most_branch_work
from img2img_server.engine.diffusers.lora_weights import WrittenLoras
from img2img_server.engine.options import Compile, ModelOptions
from tests.engine_bench import BOUND, ReplyInbox, difference, images, job, run, running
from tests.oracle.harness import families
from tests.tiny_models import write_sd

RANK = 2
CPU = torch.device("cpu")
WANTED: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.9}


def load(model: Path, folder: Path, kind: type[DiffusersDenoiser] = DiffusersDenoiser) -> Any:
    """Loads a model that computes the same LoRAs next to its layers as on a GPU."""
    denoiser: Any = kind.load(str(model), CPU, torch.float32, ModelOptions(lora_dir=folder))
    for part in Part:
        loras_of(denoiser, part)._most_work = most_branch_work(
            torch.device("cuda"), is_compiled=False
        )
    return denoiser


def loras_of(denoiser: Any, part: Part) -> Any:
    return denoiser._text_loras if part is Part.TEXT else denoiser._denoiser_loras


def write_loras(denoiser: DiffusersDenoiser, folder: Path, pattern: str = "") -> None:
    """Writes three LoRAs for every layer of the denoiser that can have one next to it, or for those
    of a pattern.
    """
    folder.mkdir(exist_ok=True)
    part, network = denoiser._family.denoiser, denoiser._model.network
    excluded = re.compile(denoiser._family.unbatched_layers)
    for number, name in enumerate(("ink", "oil", "wax")):
        generator, file = torch.Generator().manual_seed(number), {}
        for layer, module in network.named_modules():
            is_convolution = isinstance(module, nn.Conv2d) and module.groups == 1
            if not (is_convolution or isinstance(module, nn.Linear)):
                continue
            if not re.fullmatch(pattern, layer) if pattern else excluded.fullmatch(layer):
                continue
            shape = module.weight.shape
            down = torch.randn((1, *shape[1:]), generator=generator)
            up = torch.randn((shape[0], 1, *[1] * (down.ndim - 2)), generator=generator)
            # A change of a tenth of the weights, so that the output remains of the same size.
            down *= 0.1 * module.weight.norm() / (down.norm() * up.norm() + 1e-9)
            file[f"{part}.{layer}.lora_A.weight"] = down
            file[f"{part}.{layer}.lora_B.weight"] = up
        save_file(file, folder / f"{name}.safetensors")


@pytest.mark.parametrize("family", sorted(families()))
def test_each_row_of_a_batch_has_its_own_loras(family: str, tmp_path: Path) -> None:
    model = next(iter(families()[family].values()))
    folder = tmp_path / "loras"
    source = model.write(tmp_path / "model")
    plain = DiffusersDenoiser.load(str(source), CPU, torch.float32)
    write_loras(plain, folder)
    mixed = load(source, folder)
    assert mixed.loras == ("ink", "oil", "wax")

    def adapters(*loras: tuple[str, float]) -> tuple[Adapter, ...]:
        return tuple(mixed.adapter(*lora) for lora in loras)

    rows = [
        adapters(("ink", 1.0)),
        (),
        adapters(("oil", 0.7)),
        adapters(("ink", 1.0), ("wax", 0.5)),
        adapters(("ink", 0.3)),
        (),
        adapters(("ink", 1.0)),
    ]
    height, width = model.sizes[0]
    text = TextInput(
        prompt="a boat", negative_prompt="n", guidance_scale=2.0, height=height, width=width
    )
    assert {mixed.adapter_key(row) for row in rows} == {()}, "all share one batch"
    with torch.inference_mode():
        (conditioning,) = mixed.encode_texts([text])
        image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
        latents = mixed.encode_images([image])[0].mean[None]
        times = torch.full((len(rows),), 500.0)

        def outputs(denoiser: Any, own: Sequence[tuple[Adapter, ...]]) -> list[Tensor]:
            conditionings = [with_adapters(conditioning, each) for each in own]
            count = len(own)
            return list(denoiser.denoise([latents] * count, times[:count], conditionings))

        together = outputs(mixed, rows)
        again = [*outputs(mixed, rows[:2]), *outputs(mixed, [*rows[:2], ()])]
        assert not mixed._denoiser_loras._weights._kept, "no weight is stored twice"
        mixed._denoiser_loras._most_work = 0.0
        alone = [outputs(mixed, [row])[0] for row in rows]
    size = alone[1].abs().max().item()
    for place, (found, expected) in enumerate(zip(together, alone, strict=True)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * size, msg=str(place))
    for found, expected in zip(again, (*alone[:2], *alone[:2], alone[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * size)
    assert (alone[0] - alone[1]).abs().max() > 1e-2 * size, "a LoRA has an effect"


def with_adapters(conditioning: Conditioning, adapters: tuple[Adapter, ...]) -> Conditioning:
    return replace(conditioning, adapters=adapters)


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("ernie_image", r"layers\.0\.mlp\.up_proj"),
        ("krea2", r"text_fusion\.layerwise_blocks\.0\.attn\.to_q"),
        ("z_image", r"cap_embedder\.1"),
    ],
    ids=["ernie_image", "krea2", "z_image"],
)
def test_loras_of_layers_without_a_row_for_each_forward_do_not_share_batches(
    family: str, layer: str, tmp_path: Path
) -> None:
    source = next(iter(families()[family].values())).write(tmp_path / "model")
    plain = DiffusersDenoiser.load(str(source), CPU, torch.float32)
    write_loras(plain, tmp_path / "loras", layer)
    found = load(source, tmp_path / "loras")
    keys = {found.adapter_key((found.adapter(name, 1.0),)) for name in ("ink", "oil")}
    assert len(keys) == 2


@pytest.mark.parametrize(
    ("pattern", "share_on_a_cpu"),
    [(r"mid_block\..*\.to_q", False), (r"mid_block\..*\.conv1", True)],
    ids=["6.2 % of the work", "3.5 % of the work"],
)
def test_on_a_cpu_only_loras_with_little_work_share_batches(
    pattern: str, share_on_a_cpu: bool, tmp_path: Path
) -> None:
    source = write_sd(tmp_path / "model")
    on_cpu = DiffusersDenoiser.load(str(source), CPU, torch.float32)
    write_loras(on_cpu, tmp_path / "loras", pattern)
    options = ModelOptions(lora_dir=tmp_path / "loras")
    on_cpu = DiffusersDenoiser.load(str(source), CPU, torch.float32, options)
    as_on_gpu = load(source, tmp_path / "loras")

    def share(denoiser: DiffusersDenoiser) -> bool:
        rows = [(denoiser.adapter(name, 1.0),) for name in ("ink", "oil")]
        return len({denoiser.adapter_key(row) for row in rows}) == 1

    assert share(on_cpu) is share_on_a_cpu
    assert share(as_on_gpu)


class Recording(DiffusersDenoiser):
    """The real denoiser, which records the LoRAs of each batch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.batches: list[tuple[tuple[Adapter, ...], ...]] = []

    def denoise(
        self, latents: Sequence[Tensor], timesteps: Tensor, conditionings: Sequence[Conditioning]
    ) -> Sequence[Tensor]:
        self.batches.append(tuple(each.adapters for each in conditionings))
        return super().denoise(latents, timesteps, conditionings)

    @property
    def fixed_step_cost(self) -> None:
        return None  # as on a GPU, where a larger batch is always worthwhile


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a model and a folder `loras`: three LoRAs, `loha` and `text`."""
    folder = tmp_path_factory.mktemp("batches")
    denoiser = DiffusersDenoiser.load(str(write_sd(folder / "model")), CPU, torch.float32)
    write_loras(denoiser, folder / "loras")
    generator = torch.Generator().manual_seed(9)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    outputs, inputs = denoiser._model.network.get_submodule(layer).weight.shape
    key, shapes = (
        "lora_unet_" + layer.replace(".", "_"),
        {"a": (outputs, RANK), "b": (RANK, inputs)},
    )
    loha = {
        f"{key}.hada_{first}_{second}": torch.randn(shapes[second], generator=generator)
        for first in ("w1", "w2")
        for second in ("a", "b")
    }
    save_file(loha, folder / "loras" / "loha.safetensors")
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = denoiser._model.pipeline.text_encoder.config.hidden_size
    save_file(
        {
            f"{text}.lora_A.weight": torch.randn((RANK, width), generator=generator),
            f"{text}.lora_B.weight": torch.randn((width, RANK), generator=generator),
        },
        folder / "loras" / "text.safetensors",
    )
    return folder


def test_jobs_with_other_loras_share_batches_and_have_the_images_of_theirs_alone(
    source: Path,
) -> None:
    denoiser = load(source / "model", source / "loras", Recording)
    names = ["ink", "", "oil", "text", "wax", "ink", "loha", "loha"]
    many = WANTED | {"num_inference_steps": 10, "guidance_scale": 1.0}
    wanted = [
        job(job_id=place, seeds=(place,), loras=(Lora(name, 0.8),) if name else (), **many)
        for place, name in enumerate(names)
    ]
    inboxes = [ReplyInbox() for _ in wanted]
    with running(denoiser, 16, loras=denoiser.loras) as engine:
        for each, inbox in zip(wanted, inboxes, strict=True):
            engine.submit(each, inbox)
        together = [images(inbox.all())[0] for inbox in inboxes]
    batches = denoiser.batches
    kept = [len(it._weights._kept) for it in (denoiser._denoiser_loras, denoiser._text_loras)]

    denoiser = load(source / "model", source / "loras")
    for loras in (denoiser._denoiser_loras, denoiser._text_loras):
        loras._most_work = 0.0
    with running(denoiser, loras=denoiser.loras) as engine:
        alone = [images(run(engine, each))[0] for each in wanted]

    assert max(map(difference, together, alone)) <= BOUND
    assert min(difference(alone[0], each) for each in (alone[2], alone[4])) > 2 * BOUND
    assert max(len(set(batch)) for batch in batches) == 4, "ink, oil, wax and none"
    for batch in batches:
        assert len({name_of(row) == "loha" for row in batch}) == 1, "LoHa is in the weights"
    assert kept == [1, 0], "only the weight that LoHa changes is stored twice"


def name_of(adapters: tuple[Adapter, ...]) -> str:
    return ",".join(adapter.name for adapter in adapters)


def test_of_factors_that_found_no_memory_nothing_stays(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = load(source / "model", source / "loras")
    plain, inked = job(**WANTED), job(loras=(Lora("ink"),), **WANTED)
    placed = 0

    def like(*arguments: Any) -> Tensor:
        nonlocal placed
        placed += 1
        if placed == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole_like(*arguments)

    whole_like = lora_branch._like
    with running(denoiser, loras=denoiser.loras) as engine:
        expected = images(run(engine, plain))[0]
        with monkeypatch.context() as patched:
            patched.setattr(lora_branch, "_like", like)
            end = run(engine, inked)[-1]
        found = images(run(engine, plain))[0]
        (image,) = images(run(engine, inked))
    assert isinstance(end, JobFailed)
    assert difference(found, expected) == 0
    assert difference(image, expected) > 2 * BOUND


def test_large_factors_and_compiled_models_keep_loras_in_the_weights(
    source: Path, tmp_path: Path
) -> None:
    large = {}
    for key, factor in load_file(source / "loras" / "ink.safetensors").items():
        repeats = (16, *[1] * (factor.ndim - 1)) if "lora_A" in key else (1, 16)
        large[key] = factor.repeat(*repeats, *[1] * (factor.ndim - len(repeats)))
    save_file(large, tmp_path / "large.safetensors")
    denoiser = load(source / "model", tmp_path)
    large_adapters = (denoiser.adapter("large", 1.0),)
    assert denoiser.adapter_key(large_adapters) == large_adapters

    pipeline = denoiser._model.pipeline
    options = ModelOptions(lora_dir=source / "loras", compile=Compile.REGIONAL)
    compiled = DiffusersDenoiser(pipeline, options, lora_dir=source / "loras")
    adapters = (compiled.adapter("ink", 1.0),)
    assert compiled.adapter_key(adapters) == adapters
    assert isinstance(compiled._denoiser_loras._weights, WrittenLoras)
