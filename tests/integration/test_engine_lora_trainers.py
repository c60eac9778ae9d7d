"""LoRA files of further trainers: names of text encoders and of older tools, layers that a file has
twice, forms that multiply the weight, and forms that are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from tests.loras import WritingLoras
from tests.oracle.harness import families

RANK, SCALES = 2, (1.0, 0.5, -1.0)
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
SELF_ATTENTION = "layers.0.self_attn.q_proj"

Load = Callable[[str], DiffusersDenoiser]
Change = Callable[[float], Tensor]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    found: dict[str, DiffusersDenoiser] = {}

    def load(family: str) -> DiffusersDenoiser:
        if family not in found:
            folder = tmp_path_factory.mktemp("trainers") / "model"
            source = str(next(iter(families()[family].values())).write(folder))
            found[family] = DiffusersDenoiser.load(source, torch.device("cpu"), torch.float32)
        return found[family]

    return load


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def layer_of(denoiser: DiffusersDenoiser, name: str, part: str = "") -> Any:
    network: Any = getattr(denoiser._model.pipeline, part or denoiser._family.denoiser)
    modules = dict(network.named_modules())
    ends = (name, f"model.language_model.{name}", f"language_model.{name}")
    return next(modules[end] for end in ends if end in modules)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / 4


def check(
    denoiser: DiffusersDenoiser,
    folder: Path,
    file: Mapping[str, Tensor],
    expected: Mapping[str, tuple[Any, Change]],
    metadata: dict[str, str] | None = None,
) -> None:
    """Compares the weights at three scales with the sum of the original ones and the changes."""
    save(file, folder, metadata)
    found = WritingLoras(denoiser, folder)
    assert (found.names, found.refusals) == (("ink",), ())
    before = {name: layer.weight.clone() for name, (layer, _) in expected.items()}
    for scale in SCALES:
        found.use([found.adapter("ink", scale)])
        for name, (layer, change) in expected.items():
            wanted = before[name] + change(scale)
            torch.testing.assert_close(layer.weight, wanted, rtol=1e-4, atol=1e-4, msg=name)
            assert not torch.allclose(layer.weight, before[name], atol=1e-3), "it has an effect"
    found.use([])


def save(file: Mapping[str, Tensor], folder: Path, metadata: dict[str, str] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    saved = {key: it.clone(memory_format=torch.contiguous_format) for key, it in file.items()}
    save_file(saved, folder / "ink.safetensors", metadata=metadata)


def refusal(denoiser: DiffusersDenoiser, folder: Path, file: Mapping[str, Tensor]) -> str:
    save(file, folder)
    ((name, why),) = WritingLoras(denoiser, folder).refusals
    assert name == "ink"
    return why


def factors(layer: Any) -> tuple[Tensor, Tensor, Change]:
    weight = layer.weight
    down, up = draw(RANK, weight.shape[1]), draw(weight.shape[0], RANK)
    return down, up, lambda scale: scale * (up @ down)


FLAT = ".lora_down.weight", ".lora_up.weight"
AB = ".lora_A.weight", ".lora_B.weight"
OLD = "_lora.down.weight", "_lora.up.weight"
NAMED = ".lora_A.default_0.weight", ".lora_B.default_0.weight"


@pytest.mark.parametrize(
    ("family", "part", "layer", "key", "suffixes"),
    [
        ("flux", "text_encoder_2", T5, "lora_te3_" + T5.replace(".", "_"), FLAT),
        ("flux", "text_encoder_2", T5, "lora_te2_" + T5.replace(".", "_"), FLAT),
        ("flux", "text_encoder_2", T5, "text_encoders.t5xxl.transformer." + T5, AB),
        ("sd3", "text_encoder_3", T5, "lora_te3_" + T5.replace(".", "_"), FLAT),
        ("chroma", "text_encoder", T5, "lora_te1_" + T5.replace(".", "_"), FLAT),
        (
            "qwen_image",
            "text_encoder",
            SELF_ATTENTION,
            f"text_encoder.model.{SELF_ATTENTION}",
            AB,
        ),
        ("lumina2", "", "norm_out.linear_1", "lora_unet_final_layer_adaLN_modulation_1", FLAT),
        ("lumina2", "", "norm_out.linear_2", "diffusion_model.final_layer.linear", AB),
        (
            "lumina2",
            "",
            "time_caption_embed.timestep_embedder.linear_2",
            "diffusion_model.t_embedder.mlp.2",
            AB,
        ),
        (
            "lumina2",
            "",
            "time_caption_embed.caption_embedder.1",
            "lora_unet_cap_embedder_1",
            FLAT,
        ),
        ("flux", "", "x_embedder", "base_model.model.img_in", AB),
        ("sd", "", QUERY, QUERY.replace("attn1", "attn1.processor"), OLD),
        ("sd", "", OUT, OUT.replace("attn2", "attn2.processor").removesuffix(".0"), OLD),
        ("sd", "", QUERY, f"unet.{QUERY}", NAMED),
    ],
    ids=lambda value: value.replace(".", "_")[-40:] if isinstance(value, str) else value[0][:9],
)
def test_a_name_of_a_trainer_is_that_of_its_layer(
    load: Load,
    tmp_path: Path,
    family: str,
    part: str,
    layer: str,
    key: str,
    suffixes: tuple[str, str],
) -> None:
    module = layer_of(load(family), layer, part)
    down, up, change = factors(module)
    file = {key + suffixes[0]: down, key + suffixes[1]: up}
    check(load(family), tmp_path, file, {layer: (module, change)})


def test_a_layer_that_a_file_changes_twice_is_refused(load: Load, tmp_path: Path) -> None:
    denoiser = load("sd")
    down, up, _ = factors(layer_of(denoiser, QUERY))
    names = f"unet.{QUERY}", "lora_unet_" + QUERY.replace(".", "_")
    file = {
        name + suffix: it for name in names for suffix, it in zip(FLAT, (down, up), strict=True)
    }
    why = refusal(denoiser, tmp_path, file)
    assert why.startswith(f"it changes the layer {QUERY} twice, as ")
    assert all(name in why for name in names)


def test_copies_of_layers_under_the_original_names_are_not_added(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser, block = load("z_image"), "layers.0.attention"
    modules = [layer_of(denoiser, f"{block}.to_{name}") for name in "qkv"]
    sizes = [len(module.weight) for module in modules]
    down, up = draw(RANK, modules[0].weight.shape[1]), draw(sum(sizes), RANK)
    whole = f"diffusion_model.{block}.qkv"
    file = {f"{whole}.lora.down.weight": down, f"{whole}.lora.up.weight": up}
    expected = {}
    for name, module, rows in zip("qkv", modules, up.split(sizes), strict=True):
        key = f"diffusion_model.{block}.to.{name}.lora"
        file |= {f"{key}.down.weight": down, f"{key}.up.weight": rows}
        expected[name] = module, lambda scale, rows=rows: scale * (rows @ down)
    check(denoiser, tmp_path, file, expected)
    assert f"lora_copies_unused: ink.safetensors: {whole}" in caplog.text


def test_a_file_with_several_adapters_is_refused(load: Load, tmp_path: Path) -> None:
    down, up, _ = factors(layer_of(load("sd"), QUERY))
    file = {
        f"unet.{QUERY}.lora_{it}.{name}.weight": value
        for name in ("ink", "oil")
        for it, value in (("A", down), ("B", up))
    }
    assert "it has several LoRAs, ink, oil" in refusal(load("sd"), tmp_path, file)


def skewed(blocks: Tensor) -> Tensor:
    """Returns the rotations (I + Q) / (I - Q)."""
    skew, identity = blocks - blocks.transpose(-1, -2), torch.eye(blocks.shape[-1])
    return torch.stack(
        [
            torch.linalg.solve(identity - each, identity + each, left=False)
            for each in skew.flatten(0, -3)
        ]
    ).reshape(blocks.shape)


def glora(weight: Tensor) -> tuple[dict[str, Tensor], Change]:
    outputs, inputs = weight.shape[:2]
    ones = [1] * (weight.ndim - 2)
    a1, a2 = draw(inputs, RANK), draw(RANK, inputs)
    b1, b2 = draw(outputs, RANK), draw(RANK, *weight.shape[1:])
    file = {
        "a1.weight": a1.reshape(inputs, RANK, *ones),
        "a2.weight": a2.reshape(RANK, inputs, *ones),
        "b1.weight": b1.reshape(outputs, RANK, *ones),
        "b2.weight": b2,
        "alpha": torch.tensor(3.0),
    }
    mixed = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    change = (mixed + torch.einsum("or,ri...->oi...", b1, b2)) * 3 / RANK
    return file, lambda scale: scale * change


def old_glora(weight: Tensor) -> tuple[dict[str, Tensor], Change]:
    file, change = glora(weight)
    names = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1", "alpha": "alpha"}
    return {
        key.replace(key[:2], names[key[:2]]) if key != "alpha" else key: it
        for key, it in file.items()
    }, change


def oft(weight: Tensor) -> tuple[dict[str, Tensor], Change]:
    blocks = draw(len(weight) // 4, 4, 4)
    whole = torch.block_diag(*skewed(blocks))
    rotated = torch.einsum("nm,n...->m...", whole, weight)
    file = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
    return file, lambda scale: scale * (rotated - weight)


def constrained_oft(weight: Tensor) -> tuple[dict[str, Tensor], Change]:
    file, _ = oft(weight)
    blocks, most = file["oft_blocks"], 0.02 * len(weight)
    shorter = blocks * most / (blocks - blocks.transpose(1, 2)).norm()
    rotated = torch.einsum("nm,n...->m...", torch.block_diag(*skewed(shorter)), weight)
    return file | {"alpha": torch.tensor(0.02)}, lambda scale: scale * (rotated - weight)


def boft(weight: Tensor) -> tuple[dict[str, Tensor], Change]:
    count = len(weight)
    blocks, rescale = draw(2, count // 4, 4, 4), 1 + draw(count)
    file = {
        "oft_blocks": blocks,
        "rescale": rescale.reshape(-1, *[1] * (weight.ndim - 1)),
        "alpha": torch.tensor(0.0),
    }

    def change(scale: float) -> Tensor:
        found = torch.eye(count)
        for number, rotations in enumerate(scale * skewed(blocks) + (1 - scale) * torch.eye(4)):
            # Each block has four outputs: pairs of `width` neighbours, side by side.
            width = 2 * 2**number
            order = torch.arange(count).reshape(-1, 2, width).transpose(1, 2).flatten()
            mixed = torch.zeros(count, count)
            mixed[order[:, None], order] = torch.block_diag(*rotations)
            found = mixed @ found
        factors = 1 + scale * (rescale - 1)
        return torch.einsum("nm,m...->n...", factors[:, None] * found, weight) - weight

    return file, change


def ia3(weight: Tensor) -> tuple[dict[str, Tensor], Change]:
    values = draw(len(weight))
    shape = [1, -1, *[1] * (weight.ndim - 2)] if weight.ndim > 2 else [-1]
    file = {"weight": values.reshape(shape), "on_input": torch.tensor(0)}
    return file, lambda scale: scale * torch.einsum("o,o...->o...", values, weight)


def ia3_of_inputs(weight: Tensor) -> tuple[dict[str, Tensor], Change]:
    values = draw(weight.shape[1])
    shape = [1, -1, *[1] * (weight.ndim - 2)] if weight.ndim > 2 else [-1]
    file = {"weight": values.reshape(shape), "on_input": torch.tensor(1)}
    return file, lambda scale: scale * torch.einsum("i,oi...->oi...", values, weight)


@pytest.mark.parametrize(
    "form",
    [glora, old_glora, oft, constrained_oft, boft, ia3, ia3_of_inputs],
    ids=lambda it: it.__name__,
)
def test_a_form_that_multiplies_the_weight_has_its_formula(
    load: Load, tmp_path: Path, form: Callable[[Tensor], tuple[dict[str, Tensor], Change]]
) -> None:
    denoiser = load("sd")
    layers = (QUERY,) if form is old_glora else (QUERY, CONVOLUTION)
    file, expected = {}, {}
    for name in layers:
        module = layer_of(denoiser, name)
        tensors, change = form(module.weight.clone())
        prefix = "oft_unet_" if "oft" in form.__name__ else "lora_unet_"
        file |= {f"{prefix}{name.replace('.', '_')}.{key}": it for key, it in tensors.items()}
        expected[name] = module, change
    check(denoiser, tmp_path, file, expected)


def test_products_of_a_whole_layer_are_split_or_refused(load: Load, tmp_path: Path) -> None:
    denoiser = load("z_image")
    modules = [layer_of(denoiser, f"layers.0.attention.to_{name}") for name in "qkv"]
    weight = torch.cat([module.weight for module in modules])
    sizes = [len(module.weight) for module in modules]
    key = "diffusion_model.layers.0.attention.qkv"
    for form in (glora, ia3, ia3_of_inputs):
        tensors, change = form(weight.clone())
        expected = {
            str(number): (
                module,
                lambda scale, number=number, change=change: change(scale).split(sizes)[number],
            )
            for number, module in enumerate(modules)
        }
        file = {f"{key}.{name}": it for name, it in tensors.items()}
        check(denoiser, tmp_path / form.__name__, file, expected)
    file = {f"{key}.{name}": it for name, it in oft(weight)[0].items()}
    why = refusal(denoiser, tmp_path / "oft", file)
    assert "merge it into the model" in why


def test_products_with_another_size_than_their_layer_are_refused(
    load: Load, tmp_path: Path
) -> None:
    denoiser = load("sd")
    linear, convolution = (layer_of(denoiser, it).weight for it in (QUERY, CONVOLUTION))
    flat = convolution[0].numel()
    wrong = [
        (QUERY, glora(linear)[0] | {"b2.weight": draw(RANK, linear.shape[1] - 1)}),
        (CONVOLUTION, glora(convolution)[0] | {"b2.weight": draw(RANK, convolution.shape[1])}),
        (CONVOLUTION, {"weight": draw(flat), "on_input": torch.tensor(1)}),
        (QUERY, {"oft_blocks": draw(9, len(linear) // 4, 4, 4)}),
    ]
    for number, (layer, tensors) in enumerate(wrong):
        file = {f"lora_unet_{layer.replace('.', '_')}.{key}": it for key, it in tensors.items()}
        assert "size" in refusal(denoiser, tmp_path / str(number), file), layer


def test_a_tensor_with_and_without_the_name_of_an_adapter_is_refused(
    load: Load, tmp_path: Path
) -> None:
    denoiser = load("sd")
    down, up, _ = factors(layer_of(denoiser, QUERY))
    file = {}
    for adapter in ("", ".default"):
        file |= {f"{QUERY}.lora_A{adapter}.weight": down, f"{QUERY}.lora_B{adapter}.weight": up}
    assert "twice, with and without the name of an adapter" in refusal(denoiser, tmp_path, file)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("bundle_emb.cat.clip_l", "into IMG2IMG_EMBEDDINGS_DIR as files of their own"),
        (f"unet.{QUERY}.oft_R.weight", "neither LoRA, LoHa nor LoKr: merge it into the model"),
        (f"base_model.model.{QUERY}.ia3_l", "neither LoRA, LoHa nor LoKr: merge it into the model"),
        (f"diffusion_model.{QUERY}.set_weight", "as LoRAs with a control image do"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "needs a control image"),
        ("transformer_blocks.0.qkv_proj.lora_down", "use the file that it was converted from"),
        ("unet.lora_thing", "it has a form of LoRA that is not known: unet.lora_thing"),
    ],
    ids=["embeddings", "oft", "ia3", "replaced", "control", "nunchaku", "unknown"],
)
@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "with-a-lora"])
def test_a_form_that_cannot_be_used_is_named_with_what_to_do(
    load: Load, tmp_path: Path, key: str, why: str, is_alone: bool
) -> None:
    down, up, _ = factors(layer_of(load("sd"), QUERY))
    file = {} if is_alone else {f"unet.{QUERY}{AB[0]}": down, f"unet.{QUERY}{AB[1]}": up}
    found = refusal(load("sd"), tmp_path, file | {key: draw(4)})
    wanted = why if is_alone or "not known" not in why else "no part of a LoRA: unet.lora_thing"
    assert wanted in found
