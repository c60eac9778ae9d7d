"""LoRA files as other tools write them change the weights by their formulas; files whose tensors do
not fit each other are refused with a reason before a request can name them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import save_file
from torch import Tensor

from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from tests.integration.test_single_file_flow import WRITERS as ORIGINALS
from tests.integration.test_single_file_flow import _small_widths  # noqa: F401 - a fixture
from tests.loras import WritingLoras
from tests.original_layout import unet_tensors
from tests.tiny_models import write_sd, write_sdxl

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.attentions.0.norm"
TEXT = "encoder.layers.0.self_attn.q_proj"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")
RANK = 2


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> DiffusersDenoiser:
    folder = write_sd(tmp_path_factory.mktemp("lora_files") / "model")
    return DiffusersDenoiser.load(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / 4


def module(denoiser: DiffusersDenoiser, part: str, name: str) -> Any:
    network = getattr(denoiser._model.pipeline, part)
    return next(
        it for key, it in network.named_modules() if key.removeprefix("text_model.") == name
    )


def factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns two factors for a weight, and their product."""
    down = draw(RANK, *weight.shape[1:])
    up = draw(weight.shape[0], RANK, *[1] * (weight.ndim - 2))
    return down, up, torch.einsum("or,ri...->oi...", up.flatten(1), down)


Written = tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]], dict[str, Any]]


def whole_alpha(denoiser: DiffusersDenoiser) -> Written:
    weight = module(denoiser, "unet", LAYER).weight.data
    down, up, change = factors(weight)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(6)}
    return {f"{KOHYA}.{key}": it for key, it in tensors.items()}, [(weight, 3 * change)], {}


def eight_bits(denoiser: DiffusersDenoiser) -> Written:
    weight = module(denoiser, "unet", LAYER).weight.data
    down, up = (it.to(torch.float8_e4m3fn) for it in factors(weight)[:2])
    tensors = {f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}
    return tensors, [(weight, up.float() @ down.float())], {}


def peft_bias(denoiser: DiffusersDenoiser) -> Written:
    layer = module(denoiser, "unet", LAYER)
    down, up, change = factors(layer.weight)
    bias = draw(len(layer.bias))
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_B.bias": bias}
    options = {"unet.r": RANK, "unet.lora_alpha": 5, "unet.lora_bias": True}
    changes = [(layer.weight.data, 2.5 * change), (layer.bias.data, 2.5 * bias)]
    return {f"unet.{LAYER}.{key}": it for key, it in tensors.items()}, changes, options


def extracted(denoiser: DiffusersDenoiser) -> Written:
    """Returns the difference of two models as ComfyUI stores it."""
    layer, norm = (module(denoiser, "unet", name) for name in (LAYER, NORM))
    convolution, text = (
        module(denoiser, "unet", CONVOLUTION),
        module(denoiser, "text_encoder", TEXT),
    )
    tensors, changes = {}, []
    for name, each in (
        ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0", layer),
        ("diffusion_model.input_blocks.1.0.in_layers.2", convolution),
        (f"text_encoders.clip_l.transformer.text_model.{TEXT}", text),
    ):
        down, up, change = factors(each.weight)
        bias = draw(len(each.bias))
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.diff_b"] = bias
        changes += [(each.weight.data, change), (each.bias.data, bias)]
    values = draw(len(norm.weight)), draw(len(norm.bias))
    name = "diffusion_model.input_blocks.1.1.norm"
    tensors |= {f"{name}.diff": values[0], f"{name}.diff_b": values[1]}
    changes += [(norm.weight.data, values[0]), (norm.bias.data, values[1])]
    return tensors, changes, {}


def lycoris_norm(denoiser: DiffusersDenoiser) -> Written:
    norm, name = module(denoiser, "unet", NORM), "lycoris_" + NORM.replace(".", "_")
    values = draw(len(norm.weight)), draw(len(norm.bias))
    tensors = {f"{name}.w_norm": values[0], f"{name}.b_norm": values[1]}
    return tensors, [(norm.weight.data, values[0]), (norm.bias.data, values[1])], {}


def bias_only(denoiser: DiffusersDenoiser) -> Written:
    bias = module(denoiser, "unet", LAYER).bias.data
    change = draw(len(bias))
    return {f"{KOHYA}.diff_b": change}, [(bias, change)], {}


WRITERS: dict[str, Callable[[DiffusersDenoiser], Written]] = {
    writer.__name__: writer
    for writer in (whole_alpha, eight_bits, peft_bias, extracted, lycoris_norm, bias_only)
}


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_file_of_another_tool_changes_the_weights_by_its_formula(
    kind: str, denoiser: DiffusersDenoiser, tmp_path: Path
) -> None:
    with torch.inference_mode():
        tensors, changes, options = WRITERS[kind](denoiser)
        header = {"lora_adapter_metadata": json.dumps(options)} if options else None
        saved = {key: it.contiguous() for key, it in tensors.items()}
        save_file(saved, tmp_path / "ink.safetensors", metadata=header)
        found = WritingLoras(denoiser, tmp_path)
        assert found.names == ("ink",), found.refusals
        before = [value.clone() for value, _ in changes]
        for scale in (1.0, 0.5):
            found.use([found.adapter("ink", scale)])
            for (value, change), original in zip(changes, before, strict=True):
                torch.testing.assert_close(value, original + scale * change, rtol=1e-4, atol=1e-4)
        found.use([])
        assert all(map(torch.equal, before, [value for value, _ in changes]))


def test_a_file_with_the_original_names_of_a_unet_changes_the_same_layers(tmp_path: Path) -> None:
    folder = write_sdxl(tmp_path / "model", is_deep=True)
    denoiser = DiffusersDenoiser.load(str(folder), torch.device("cpu"), torch.float32)
    network = denoiser._model.network
    names = dict(zip(network.state_dict(), unet_tensors(network), strict=True))
    files: dict[str, dict[str, Tensor]] = {"diffusers": {}, "kohya": {}, "comfy": {}}
    for key, weight in network.state_dict().items():
        if not key.endswith(".weight") or weight.ndim == 1:
            continue
        layer = key.removesuffix(".weight")
        original = names[key].removeprefix("model.diffusion_model.").removesuffix(".weight")
        down, up, _ = factors(weight)
        for file, name in (
            ("diffusers", f"unet.{layer}"),
            ("kohya", f"lora_unet_{original.replace('.', '_')}"),
            ("comfy", f"diffusion_model.{original}"),
        ):
            tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            files[file] |= tensors
    (tmp_path / "loras").mkdir()
    for file, tensors in files.items():
        saved = {key: it.contiguous().clone() for key, it in tensors.items()}
        save_file(saved, tmp_path / "loras" / f"{file}.safetensors")
    found = WritingLoras(denoiser, tmp_path / "loras")
    assert len(found.names) == 3, found.refusals
    results = []
    with torch.inference_mode():
        for name in sorted(files):
            found.use([found.adapter(name, 1.0)])
            results.append({key: it.clone() for key, it in network.state_dict().items()})
    assert all(torch.equal(results[0][key], each[key]) for each in results for key in results[0])


@pytest.mark.usefixtures("_small_widths")
@pytest.mark.parametrize("kind", ["chroma", "flux-dev", "sd3.5"])
def test_a_file_with_the_original_names_of_a_transformer_is_converted_like_the_model(
    kind: str, tmp_path: Path
) -> None:
    family, write = ORIGINALS[kind]
    tensors = write(tmp_path / family)
    cpu = torch.device("cpu")
    denoiser = DiffusersDenoiser.load(str(tmp_path / family), cpu, torch.float32)
    network = denoiser._model.network
    start, changes, file = "model.diffusion_model.", {}, {}
    tensors = {
        key.removeprefix(start): it
        for key, it in tensors.items()
        if not key.startswith("first_stage_model.")
    }
    for key, value in tensors.items():
        layer, _, kind_of_tensor = key.rpartition(".")
        is_norm = value.ndim == 1 and f"{layer}.bias" not in tensors
        if kind_of_tensor in ("weight", "bias") and not is_norm:
            changes[key] = draw(*value.shape)
            suffix = "diff" if kind_of_tensor == "weight" else "diff_b"
            file[f"lora_unet_{layer.replace('.', '_')}.{suffix}"] = changes[key]
    (tmp_path / "loras").mkdir()
    save_file(file, tmp_path / "loras" / "ink.safetensors")
    changed = {key: value + changes.get(key, torch.zeros(())) for key, value in tensors.items()}
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
    expected = convert(checkpoint=changed, config=network.config)
    with torch.inference_mode():
        found = WritingLoras(denoiser, tmp_path / "loras")
        assert found.names == ("ink",), found.refusals
        found.use([found.adapter("ink", 1.0)])
        for name, value in network.state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)
    assert len(changes) > 30


def lora(down: Tensor, up: Tensor, **others: Tensor) -> dict[str, Tensor]:
    tensors = {"lora_down.weight": down, "lora_up.weight": up, **others}
    return {f"{KOHYA}.{key}": it for key, it in tensors.items()}


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "ranks": (
        lora(torch.ones(3, 16), torch.ones(16, 2)),
        "tensors that do not fit each other: down [3, 16], up [16, 2]",
    ),
    "loha": (
        {
            f"{KOHYA}.hada_w{number}_{side}": torch.ones(shape)
            for number, side, shape in (
                (1, "a", (16, 2)),
                (1, "b", (2, 16)),
                (2, "a", (16, 3)),
                (2, "b", (2, 16)),
            )
        },
        "tensors that do not fit each other",
    ),
    "lokr": (
        {f"{KOHYA}.lokr_w1": torch.ones(16), f"{KOHYA}.lokr_w2": torch.ones(1, 16)},
        "tensors that do not fit each other",
    ),
    "vectors": (lora(torch.ones(16), torch.ones(16)), "tensors that do not fit each other"),
    "scalar": (lora(torch.tensor(1.0), torch.ones(16, 2)), "tensors that do not fit each other"),
    "nothing": (lora(torch.ones(0, 16), torch.ones(16, 0)), "has no values"),
    "alphas": (
        lora(torch.ones(2, 16), torch.ones(16, 2), alpha=torch.ones(2)),
        "alpha has 2 values instead of one",
    ),
    "vector": ({f"{KOHYA}.diff": torch.ones(16)}, "is no matrix or convolution"),
    "halves": (
        {
            f"{KOHYA}.lora_down.weight": torch.ones(2, 16),
            f"{KOHYA}.lora_up.weight": torch.ones(8, 2),
        },
        "the file belongs to another model",
    ),
    "no-bias": (
        {f"{KOHYA.replace('to_out_0', 'to_q')}.diff_b": torch.ones(16)},
        "changes the bias of down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q, which has",
    ),
    "bias": ({f"{KOHYA}.diff_b": torch.ones(7)}, "the file belongs to another model"),
    "peft": (
        {
            f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 16),
            f"base_model.model.{LAYER}.lora_B.weight": torch.ones(16, 2),
        },
        "saved by peft, whose alpha is in another file, adapter_config.json",
    ),
}
HEADERS: dict[str, dict[str, Any]] = {
    "alpha": {"unet.lora_alpha": "high"},
    "pattern": {"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 1}},
    "patterns": {"unet.lora_alpha": 4, "unet.alpha_pattern": [1]},
}


def test_a_file_whose_tensors_do_not_fit_each_other_is_refused_when_it_is_read(
    denoiser: DiffusersDenoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, (tensors, _) in WRONG.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for name, options in HEADERS.items():
        header = {"lora_adapter_metadata": json.dumps(options)}
        factors = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 16)}
        factors[f"unet.{LAYER}.lora_B.weight"] = torch.ones(16, 2)
        save_file(factors, tmp_path / f"header-{name}.safetensors", metadata=header)

    with caplog.at_level(logging.WARNING):
        found = WritingLoras(denoiser, tmp_path)

    assert found.names == ()
    reasons = dict(found.refusals)
    for name, (_, sentence) in WRONG.items():
        assert sentence in reasons[name]
    for name in HEADERS:
        assert "lora_adapter_metadata has a wrong alpha" in reasons[f"header-{name}"]
    assert all(not record.exc_info for record in caplog.records), "no stack trace"
