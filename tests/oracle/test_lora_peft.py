"""LoRA files give the same output of the network as peft, which writes and loads them. `make
oracle-lora` installs peft into a folder of its own and runs this: with peft among the packages,
diffusers and transformers load models in another way than the service does.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from img2img_server.domain.params import Lora
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.options import ModelOptions
from tests.engine_bench import BOUND, Stock, blocks, difference, images, job, run, running
from tests.loras import WritingLoras
from tests.oracle.harness import families

pytest.importorskip("peft")

LAYERS = {
    "sd": ["to_q", "to_v", "conv1", "ff.net.2"],
    "sdxl": ["to_q", "to_v", "conv1", "ff.net.2"],
    "kolors": ["to_q", "to_v", "conv1"],
    "z_image": ["to_q", "to_v", "w1"],
}
OTHERS = ["to_q", "to_v", "to_k"]
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"to_v": 3}, "alpha_pattern": {"to_v": 8}},
}
CASES = [
    *((family, "lora", option) for family in ("sd", "sdxl", "flux", "sd3") for option in LORA),
    *(
        (family, "lora", option)
        for family in (
            "chroma",
            "kolors",
            "krea2",
            "lumina2",
            "qwen_image",
            "sana_sprint",
            "z_image",
        )
        for option in ("plain", "dora")
    ),
    *((family, form, "") for family in ("sd", "flux", "z_image") for form in ("loha", "lokr")),
]


@pytest.mark.parametrize(("family", "form", "option"), CASES)
def test_the_weights_are_those_of_peft(family: str, form: str, option: str, tmp_path: Path) -> None:
    peft: Any = importlib.import_module("peft")
    folder = next(iter(families()[family].values())).write(tmp_path / "model")
    ours = load(folder)
    theirs = load(folder)._model.network
    part = ours._family.denoiser
    layers = LAYERS.get(family, OTHERS)
    torch.manual_seed(3)
    if form == "lora":
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=layers, **LORA[option])
    elif form == "loha":
        config = peft.LoHaConfig(r=2, alpha=5, target_modules=layers)
    else:
        # With a larger rank peft stores both factors of small layers whole, and scales them still.
        config = peft.LoKrConfig(r=1, alpha=5, target_modules=layers, decompose_both=False)
    peft.inject_adapter_in_model(config, theirs, "ink")
    for name, parameter in theirs.named_parameters():
        if any(kind in name for kind in ("lora_", "hada_", "lokr_")):
            parameter.data = torch.randn_like(parameter) / 3 + ("magnitude" in name)
    save(peft.get_peft_model_state_dict(theirs, adapter_name="ink"), config, part, tmp_path)

    found = WritingLoras(ours, tmp_path)
    assert found.names == ("ink",)
    changed = 0
    for scale in (1.0, 0.5, -1.0):
        with torch.inference_mode():
            found.use([found.adapter("ink", scale)])
            for name, module in theirs.named_modules():
                if not hasattr(module, "get_delta_weight") or not hasattr(module, "scaling"):
                    continue
                whole = merged(module, scale)
                weight = ours._model.network.get_submodule(name).weight
                torch.testing.assert_close(weight, whole, rtol=1e-4, atol=1e-4)
                changed += not torch.allclose(whole, module.base_layer.weight, atol=1e-2)
    assert changed >= 4


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd3", "z_image"])
def test_two_loras_at_once_are_those_of_set_adapters(family: str, tmp_path: Path) -> None:
    model = next(iter(families()[family].values()))
    folder = model.write(tmp_path / "model")
    stock = Stock(folder, model.call)
    (tmp_path / "loras").mkdir()
    denoiser = load(folder)
    part, network = denoiser._family.denoiser, denoiser._model.network
    layers = LAYERS.get(family, OTHERS)
    for number, name in enumerate(("ink", "oil")):
        generator = torch.Generator().manual_seed(number)
        file = {}
        for layer, module in network.named_modules():
            if layer.endswith(tuple(layers)):
                down = torch.randn((2, *module.weight.shape[1:]), generator=generator) / 3
                up = torch.randn((module.weight.shape[0], 2), generator=generator) / 3
                file[f"{part}.{layer}.lora_A.weight"] = down
                up = up.reshape(*up.shape, *[1] * (down.ndim - 2))
                file[f"{part}.{layer}.lora_B.weight"] = up
        save_file(file, tmp_path / "loras" / f"{name}.safetensors")
        stock._pipeline.load_lora_weights(file, adapter_name=name)
    options = ModelOptions(lora_dir=tmp_path / "loras")
    cpu = torch.device("cpu")
    denoiser = DiffusersDenoiser.load(str(folder), cpu, torch.float32, options)
    image, found = blocks(*model.sizes[0]), []
    scheduler = denoiser._family.default_scheduler
    with running(denoiser, loras=denoiser.loras) as engine:
        for scales in ((0.5, 0.8), (1.0, 0.25)):
            loras = tuple(map(Lora, ("ink", "oil"), scales))
            wanted = job(loras=loras, scheduler=scheduler, init_image=image, strength=0.9)
            stock._pipeline.set_adapters(["ink", "oil"], list(scales))
            (expected,) = stock.images(wanted)
            found += images(run(engine, wanted))
            assert difference(found[-1], expected) <= BOUND
        plain = replace(wanted, params=replace(wanted.params, loras=()))
        found += images(run(engine, plain))
    assert min(map(difference, found, found[1:])) > 2 * BOUND, "scales and LoRAs have effects"


def load(folder: Path) -> DiffusersDenoiser:
    return DiffusersDenoiser.load(str(folder), torch.device("cpu"), torch.float32)


def merged(module: Any, scale: float) -> torch.Tensor:
    """Returns the weight that peft merges an adapter into."""
    before = module.base_layer.weight.data.clone()
    module.set_scale("ink", scale)
    module.merge(adapter_names=["ink"])
    whole = module.base_layer.weight.data.clone()
    module.merged_adapters.clear()
    module.base_layer.weight.data = before
    return whole


def save(weights: dict[str, Any], config: Any, part: str, folder: Path) -> None:
    """Writes the file as diffusers does, with the options of peft in its header. The options of
    LoHa and LoKr go where LyCORIS has them.
    """
    file = {f"{part}.{key}": value.contiguous() for key, value in weights.items()}
    header = {}
    if hasattr(config, "lora_alpha"):
        options = {
            f"{part}.{name}": sorted(value) if isinstance(value, set) else value
            for name, value in config.to_dict().items()
        }
        header["lora_adapter_metadata"] = json.dumps(options, default=str)
    else:
        names = {key.rsplit(".", 1)[0] for key in file}
        file |= {f"{name}.alpha": torch.tensor(float(config.alpha)) for name in names}
    save_file(file, folder / "ink.safetensors", metadata=header)
