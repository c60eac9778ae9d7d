"""Every form of LoRA file changes the weights by its own formula, and a file that cannot be used
completely is refused without stopping the others.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from img2img_server.engine.diffusers import lora_file
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.lora_layers import Part
from img2img_server.errors import EngineError
from tests.loras import WritingLoras
from tests.oracle.harness import families
from tests.tiny_models import write_sd

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK, ALPHA = 2, 3.0

Draw = Callable[..., Tensor]
Written = tuple[dict[str, Tensor], Callable[[float], Tensor]]
Write = Callable[[Tensor, Draw], Written]


def lora(weight: Tensor, draw: Draw) -> Written:
    down, up = draw(RANK, *weight.shape[1:]), draw(weight.shape[0], RANK)
    tensors = {
        "lora_down.weight": down,
        "lora_up.weight": up.reshape(*up.shape, *[1] * (weight.ndim - 2)),
        "alpha": torch.tensor(ALPHA),
    }
    change = torch.einsum("or,ri...->oi...", up, down) * ALPHA / RANK
    return tensors, lambda scale: weight + scale * change


def locon_tucker(weight: Tensor, draw: Draw) -> Written:
    down, mid = draw(RANK, weight.shape[1], 1, 1), draw(RANK, RANK, 3, 3)
    up = draw(weight.shape[0], RANK, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    # Three convolutions, one after the other.
    basis = torch.eye(weight.shape[1])[:, :, None, None].expand(-1, -1, 1, 1)
    conv = torch.nn.functional.conv2d
    image = torch.nn.functional.pad(basis, (2, 2, 2, 2))
    answer = conv(conv(conv(image, down), mid), up)  # the mirrored kernel for each input
    change = answer.flip(2, 3).permute(1, 0, 2, 3)
    return tensors, lambda scale: weight + scale * change


def loha(weight: Tensor, draw: Draw) -> Written:
    flat = weight.flatten(1).shape[1]
    a, b, c, d = (draw(*s) for s in ((weight.shape[0], RANK), (RANK, flat)) * 2)
    tensors = dict(
        zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (a, b, c, d), strict=True)
    )
    tensors["alpha"] = torch.tensor(ALPHA)
    change = ((a @ b) * (c @ d)).reshape(weight.shape) * ALPHA / RANK
    return tensors, lambda scale: weight + scale * change


def loha_tucker(weight: Tensor, draw: Draw) -> Written:
    outputs, inputs = weight.shape[:2]
    factors = [
        (32 * draw(RANK, RANK, 3, 3), draw(RANK, outputs), draw(RANK, inputs)) for _ in range(2)
    ]
    tensors = {}
    for number, (core, first, second) in enumerate(factors, 1):
        tensors[f"hada_t{number}"] = core
        tensors[f"hada_w{number}_a"], tensors[f"hada_w{number}_b"] = first, second
    kernels = [
        sum(
            core[i, j][None, None] * first[i][:, None, None, None] * second[j][None, :, None, None]
            for i in range(RANK)
            for j in range(RANK)
        )
        for core, first, second in factors
    ]
    return tensors, lambda scale: weight + scale * kernels[0] * kernels[1]


def lokr(weight: Tensor, draw: Draw) -> Written:
    first = draw(2, 4)
    a, b = draw(weight.shape[0] // 2, RANK), draw(RANK, weight[0].numel() // 4)
    tensors = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    second = (a @ b).reshape(weight.shape[0] // 2, weight.shape[1] // 4, *weight.shape[2:])
    blocks = [[first[i, j] * second for j in range(4)] for i in range(2)]
    change = torch.cat([torch.cat(row, 1) for row in blocks], 0) * ALPHA / RANK
    return tensors, lambda scale: weight + scale * change


def lokr_whole(weight: Tensor, draw: Draw) -> Written:
    first = draw(2, 2)
    second = draw(weight.shape[0] // 2, weight.shape[1] // 2, *weight.shape[2:])
    # Without a rank the alpha has no effect.
    tensors = {"lokr_w1": first, "lokr_w2": second, "alpha": torch.tensor(ALPHA)}
    blocks = [[first[i, j] * second for j in range(2)] for i in range(2)]
    change = torch.cat([torch.cat(row, 1) for row in blocks], 0)
    return tensors, lambda scale: weight + scale * change


def difference(weight: Tensor, draw: Draw) -> Written:
    change = draw(*weight.shape)
    return {"diff": change}, lambda scale: weight + scale * change


def dora(weight: Tensor, draw: Draw) -> Written:
    tensors, plain = lora(weight, draw)
    magnitude = draw(weight.shape[0]).abs() + 0.5
    tensors["dora_scale"] = magnitude.reshape(-1, *[1] * (weight.ndim - 1))
    changed = plain(1.0)
    whole = torch.stack([m * row / row.norm() for m, row in zip(magnitude, changed, strict=True)])
    return tensors, lambda scale: weight + scale * (whole - weight)


def dora_by_input(weight: Tensor, draw: Draw) -> Written:
    tensors, plain = loha(weight, draw)
    magnitude = draw(weight.shape[1]).abs() + 0.5
    tensors["dora_scale"] = magnitude.reshape(1, -1, *[1] * (weight.ndim - 2))
    columns = plain(1.0).unbind(1)
    whole = torch.stack([m * c / c.norm() for m, c in zip(magnitude, columns, strict=True)], 1)
    return tensors, lambda scale: weight + scale * (whole - weight)


FORMS: Mapping[str, tuple[Write, tuple[str, ...]]] = {
    "lora": (lora, (LINEAR, CONVOLUTION)),
    "locon_tucker": (locon_tucker, (CONVOLUTION,)),
    "loha": (loha, (LINEAR, CONVOLUTION)),
    "loha_tucker": (loha_tucker, (CONVOLUTION,)),
    "lokr": (lokr, (LINEAR,)),
    "lokr_whole": (lokr_whole, (LINEAR, CONVOLUTION)),
    "difference": (difference, (LINEAR, CONVOLUTION)),
    "dora": (dora, (LINEAR, CONVOLUTION)),
    "dora_by_input": (dora_by_input, (LINEAR, CONVOLUTION)),
}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> DiffusersDenoiser:
    model = write_sd(tmp_path_factory.mktemp("lora_forms") / "model")
    return load(model)


def load(model: Path) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(str(model), torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(7)
        yield


def loras(denoiser: DiffusersDenoiser, folder: Path) -> WritingLoras:
    return WritingLoras(denoiser, folder)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape) / 4


def weight_of(denoiser: DiffusersDenoiser, part: str, name: str) -> Tensor:
    network: Any = getattr(denoiser._model.pipeline, part)
    modules = dict(network.named_modules())
    return modules.get(name, modules.get(f"text_model.{name}")).weight.data


def check(
    found: WritingLoras, expected: Mapping[str, tuple[Tensor, Callable[[float], Tensor]]]
) -> None:
    """Compares the weights at three scales, and afterwards."""
    before = {name: weight.clone() for name, (weight, _) in expected.items()}
    for scale in (1.0, 0.5, -1.0):
        found.use([found.adapter("ink", scale)])
        for name, (weight, formula) in expected.items():
            torch.testing.assert_close(weight, formula(scale), rtol=1e-4, atol=1e-4, msg=name)
            assert not torch.allclose(weight, before[name], atol=1e-2), "it does change the weight"
    found.use([])
    for name, (weight, _) in expected.items():
        assert torch.equal(weight, before[name]), "and nothing of it stays"


@pytest.mark.parametrize("form", FORMS)
def test_a_form_changes_the_weights_by_its_formula(
    denoiser: DiffusersDenoiser, form: str, tmp_path: Path
) -> None:
    write, layers = FORMS[form]
    file, expected = {}, {}
    parts = [("unet", name, "lora_unet_" + name) for name in layers]
    if LINEAR in layers:
        parts.append(("text_encoder", TEXT, f"lora_te_text_model_{TEXT}"))
    for part, name, spelt in parts:
        weight = weight_of(denoiser, part, name)
        tensors, formula = write(weight.clone(), draw)
        file |= {f"{spelt.replace('.', '_')}.{key}": value for key, value in tensors.items()}
        expected[name] = weight, formula
    save_file(
        {key: value.contiguous() for key, value in file.items()}, tmp_path / "ink.safetensors"
    )

    check(loras(denoiser, tmp_path), expected)


@pytest.mark.parametrize("option", ["rslora", "alpha_pattern", "dora"])
def test_the_options_of_peft_are_applied(
    denoiser: DiffusersDenoiser, option: str, tmp_path: Path
) -> None:
    weight = weight_of(denoiser, "unet", LINEAR)
    original, down, up = weight.clone(), draw(RANK, weight.shape[1]), draw(weight.shape[0], RANK)
    file = {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}
    options: dict[str, Any] = {"unet.r": RANK, "unet.lora_alpha": 4}
    factor, magnitude = 4 / RANK, draw(weight.shape[0]).abs() + 0.5
    if option == "rslora":
        options["unet.use_rslora"], factor = True, 4 / math.sqrt(RANK)
    elif option == "alpha_pattern":
        options["unet.alpha_pattern"], factor = {"attn1.to_q": 7, "to_k": 9}, 7 / RANK
    else:
        options["unet.use_dora"] = True
        file[f"unet.{LINEAR}.lora_magnitude_vector"] = magnitude
    header = {"lora_adapter_metadata": json.dumps(options)}
    save_file(file, tmp_path / "ink.safetensors", metadata=header)

    def formula(scale: float) -> Tensor:
        changed = original + scale * factor * (up @ down)
        if option != "dora":
            return changed
        return torch.stack(
            [m * row / row.norm() for m, row in zip(magnitude, changed, strict=True)]
        )

    check(loras(denoiser, tmp_path), {LINEAR: (weight, formula)})


# The names that a layer has in other tools, by family, and those of its pieces in diffusers.
WHOLE_LAYERS = {
    "flux": ("lora_unet_double_blocks_0_img_attn_qkv", "transformer_blocks.0.attn.to_{}"),
    "chroma": ("diffusion_model.double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_{}"),
    "sd3": ("lora_unet_joint_blocks_0_x_block_attn_qkv", "transformer_blocks.0.attn.to_{}"),
    "sd3_text": (
        "diffusion_model.joint_blocks.0.context_block.attn.qkv",
        "transformer_blocks.0.attn.add_{}_proj",
    ),
    "z_image": ("diffusion_model.layers.0.attention.qkv", "layers.0.attention.to_{}"),
    "lumina2": ("diffusion_model.layers.0.attention.qkv", "layers.0.attn.to_{}"),
}


@pytest.mark.parametrize("family", WHOLE_LAYERS)
def test_a_layer_that_other_tools_keep_whole_is_split(family: str, tmp_path: Path) -> None:
    model = next(iter(families()[family.removesuffix("_text")].values())).write(tmp_path / "model")
    denoiser = load(model)
    key, name = WHOLE_LAYERS[family]
    names = [name.format(letter) for letter in "qkv"]
    weights = [weight_of(denoiser, "transformer", name) for name in names]
    sizes = [len(weight) for weight in weights]
    for form in ("lora", "lokr", "dora", "difference"):
        tensors, formula = FORMS[form][0](torch.cat(weights).clone(), draw)
        file = {f"{key}.{suffix}": value.contiguous() for suffix, value in tensors.items()}
        (folder := tmp_path / form).mkdir()
        save_file(file, folder / "ink.safetensors")

        def piece(
            number: int, formula: Callable[[float], Tensor] = formula
        ) -> Callable[[float], Tensor]:
            return lambda scale: formula(scale).split(sizes)[number]

        expected = {name: (weights[i], piece(i)) for i, name in enumerate(names)}
        check(loras(denoiser, folder), expected)


def test_a_whole_layer_of_another_size_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser = load(next(iter(families()["z_image"].values())).write(tmp_path / "model"))
    key, name = WHOLE_LAYERS["z_image"]
    weights = [weight_of(denoiser, "transformer", name.format(letter)) for letter in "qkv"]
    whole = torch.cat(weights)
    (folder := tmp_path / "loras").mkdir()
    for file, layer in (("more", torch.cat([whole, whole])), ("less", whole[:-8]), ("ink", whole)):
        for form in ("lora", "dora"):
            tensors, _ = FORMS[form][0](layer.clone(), draw)
            saved = {f"{key}.{suffix}": value.contiguous() for suffix, value in tensors.items()}
            save_file(saved, folder / f"{file}-{form}.safetensors")

    assert loras(denoiser, folder).names == ("ink-dora", "ink-lora")
    assert caplog.text.count("but its layers here have") == 4


def test_a_file_that_does_not_fit_is_reported_and_does_not_stop_the_others(
    denoiser: DiffusersDenoiser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weight = weight_of(denoiser, "unet", LINEAR)
    name = f"unet.{LINEAR}"
    good = {
        f"{name}.lora_A.weight": draw(RANK, weight.shape[1]),
        f"{name}.lora_B.weight": draw(weight.shape[0], RANK),
    }
    wrong: dict[str, tuple[dict[str, Tensor], str]] = {
        "size": ({**good, f"{name}.lora_A.weight": draw(RANK, 7)}, "belongs to another model"),
        "layer": (
            {key.replace("attn1", "attn9"): value for key, value in good.items()},
            "the model has no layers for unet.down_blocks.0",
        ),
        "family": (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": draw(RANK, 64),
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": draw(192, RANK),
            },
            "the model has no layers for lora_unet_double_blocks_0_img_attn_qkv",
        ),
        "more": ({**good, "bundle_emb.x": draw(4)}, "into IMG2IMG_EMBEDDINGS_DIR as files"),
        "half": ({f"{name}.lora_A.weight": draw(RANK, 4)}, "no complete LoRA"),
        "nan": (
            {**good, f"{name}.lora_B.weight": torch.full((weight.shape[0], RANK), math.nan)},
            "not finite",
        ),
        "checkpoint": ({"model.diffusion_model.out.weight": draw(4)}, "no tensors of a LoRA"),
    }
    for file, (tensors, _) in wrong.items():
        save_file(tensors, tmp_path / f"{file}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "size.safetensors").read_bytes()[:-100])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "page.safetensors").write_text("<html></html>")
    save_file(good, tmp_path / "ink.safetensors")
    options = {"unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}
    header = {"lora_adapter_metadata": json.dumps(options)}
    save_file(good, tmp_path / "pissa.safetensors", metadata=header)

    with caplog.at_level(logging.WARNING):
        found = loras(denoiser, tmp_path)

    assert found.names == ("ink",)
    messages = [record.getMessage() for record in caplog.records]
    refused = [it.split(": ", 2) for it in messages if it.startswith("lora_refused: ")]
    reasons = {file: reason for _, file, reason in refused}
    assert set(reasons) == {
        f"{file}.safetensors" for file in (*wrong, "cut", "empty", "page", "pissa")
    }
    for file, (_, reason) in wrong.items():
        assert reason in reasons[f"{file}.safetensors"]
    damages = {"cut": "it is cut off", "empty": "it is empty", "page": "it is an HTML or XML page"}
    assert all(reasons[f"{file}.safetensors"].startswith(it) for file, it in damages.items())
    assert all(record.exc_info in (None, False) for record in caplog.records)


def test_two_loras_of_one_weight_share_the_copy_of_the_original(
    denoiser: DiffusersDenoiser, tmp_path: Path
) -> None:
    weight = weight_of(denoiser, "unet", LINEAR)
    before = weight.clone()
    for name in ("ink", "oil"):
        tensors, _ = lora(weight, draw)
        key = "lora_unet_" + LINEAR.replace(".", "_")
        save_file({f"{key}.{k}": v for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    found = loras(denoiser, tmp_path)

    for name in ("ink", "oil"):
        found.use([found.adapter(name, 1.0)])
    assert len(found.written[Part.DENOISER]._kept) == 1
    found.use([])
    assert torch.equal(weight, before)


def test_new_files_are_offered_and_deleted_ones_are_not(
    denoiser: DiffusersDenoiser, tmp_path: Path
) -> None:
    weight = weight_of(denoiser, "unet", LINEAR)
    before, key = weight.clone(), "lora_unet_" + LINEAR.replace(".", "_")
    found = loras(denoiser, tmp_path)
    assert (found.names, found.refresh()) == ((), False)

    def save(name: str) -> Callable[[float], Tensor]:
        tensors, formula = lora(before, draw)
        save_file({f"{key}.{k}": v for k, v in tensors.items()}, tmp_path / f".{name}")
        (tmp_path / f".{name}").rename(tmp_path / f"{name}.safetensors")
        return formula

    before_key = found.fingerprint
    first = save("ink")
    # A file is read when it has not changed since the refresh before.
    assert [found.refresh() for _ in range(3)] == [False, True, False]
    assert found.names == ("ink",)
    found.use([found.adapter("ink", 1.0)])
    torch.testing.assert_close(weight, first(1.0))

    first_key = found.fingerprint
    second = save("ink")
    assert [found.refresh() for _ in range(3)] == [False, True, False]
    found.use([found.adapter("ink", 1.0)])
    torch.testing.assert_close(weight, second(1.0))

    assert len({before_key, first_key, found.fingerprint}) == 3

    (tmp_path / "ink.safetensors").unlink()
    assert (found.refresh(), found.names) == (True, ())
    with pytest.raises(EngineError, match="the LoRA ink was removed"):
        found.use([found.adapter("ink", 1.0)])
    found.use([])
    assert torch.equal(weight, before)


def test_a_file_that_cannot_be_read_now_is_read_again(
    denoiser: DiffusersDenoiser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weight = weight_of(denoiser, "unet", LINEAR)
    tensors, _ = lora(weight, draw)
    key = "lora_unet_" + LINEAR.replace(".", "_")
    file = tmp_path / "ink.safetensors"
    save_file({f"{key}.{k}": v for k, v in tensors.items()}, file)

    def unreadable(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(lora_file, "safe_open", unreadable)
        found = loras(denoiser, tmp_path)
        assert (found.refresh(), found.names) == (False, ())
    assert (found.refresh(), found.names) == (True, ("ink",))
    events = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert events.count("lora_unreadable") == 1, "it is reported once"

    with monkeypatch.context() as patched:
        patched.setattr(lora_file, "safe_open", unreadable)
        file.touch()
        os.utime(file, ns=(0, 0))
        assert [found.refresh() for _ in range(3)] == [False] * 3
        assert found.names == ("ink",), "the former content is offered"
    assert (found.refresh(), found.names) == (False, ("ink",)), "the content is equal"


@pytest.mark.parametrize(("form", "is_by_input"), [("dora", False), ("dora_by_input", True)])
def test_magnitudes_are_checked_without_the_norms_of_weights(
    denoiser: DiffusersDenoiser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    form: str,
    is_by_input: bool,
) -> None:
    tensors, _ = FORMS[form][0](weight_of(denoiser, "unet", LINEAR).clone(), draw)
    key = "lora_unet_" + LINEAR.replace(".", "_")
    (name,) = (name for name in tensors if "magnitude" in name or "dora_scale" in name)
    longer = torch.cat([tensors[name], tensors[name]], dim=1 if is_by_input else 0)
    for file, magnitude in (("ink", tensors[name]), ("long", longer)):
        saved = {f"{key}.{k}": v.contiguous() for k, v in (tensors | {name: magnitude}).items()}
        save_file(saved, tmp_path / f"{file}.safetensors")

    def fail(*_: object, **__: object) -> Tensor:
        raise AssertionError("a norm was computed")

    monkeypatch.setattr(torch.linalg, "vector_norm", fail)
    found = loras(denoiser, tmp_path)

    assert found.names == ("ink",)
    assert "magnitudes that do not fit its layer" in caplog.text
