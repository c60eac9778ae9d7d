"""Single files of SD3, FLUX.1, Chroma and Z-Image give the images of diffusers' own loader."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_model, single_file_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from img2img_server.engine.diffusers.clip_tokenizer import clip_tokenizer
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.local_model import find_model
from img2img_server.engine.diffusers.weights_size import weights_size
from img2img_server.engine.family import ModelError
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.engine.options import EngineOptions, ModelOptions
from tests.engine_bench import BOUND, blocks, difference, images, job, run, running
from tests.oracle.families import chroma, flux, sd3, z_image
from tests.original_layout import (
    autoencoder_model,
    autoencoder_tensors,
    clip_config,
    clip_tensors,
)
from tests.tiny_flow import DYNAMIC_SHIFT, T5_WIDTH, lively
from tests.tiny_models import WIDTH
from tests.tiny_qwen import TEXT_WIDTH

MAPPINGS: dict[str, Any] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
PACKED: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": T5_WIDTH,
}
DOUBLE = [
    *(f"{side}_attn.{name}" for side in ("img", "txt") for name in ("qkv.weight", "qkv.bias")),
    *(
        f"{side}_attn.norm.{name}_norm.scale"
        for side in ("img", "txt")
        for name in ("query", "key")
    ),
    *(f"{side}_attn.proj.{kind}" for side in ("img", "txt") for kind in ("weight", "bias")),
    *(
        f"{side}_mlp.{number}.{kind}"
        for side in ("img", "txt")
        for number in (0, 2)
        for kind in ("weight", "bias")
    ),
]
H = 128  # the width of the small transformers


def packed_shapes(has_modulation: bool) -> dict[str, tuple[int, ...]]:
    """Returns the tensors of FLUX.1 and Chroma that both have, by their original names."""
    found: dict[str, tuple[int, ...]] = {
        "img_in.weight": (H, 64),
        "img_in.bias": (H,),
        "txt_in.weight": (H, T5_WIDTH),
        "txt_in.bias": (H,),
        "final_layer.linear.weight": (64, H),
        "final_layer.linear.bias": (64,),
    }
    widths = {"qkv": (3 * H, H), "proj": (H, H), "mlp.0": (4 * H, H), "mlp.2": (H, 4 * H)}
    for name in DOUBLE:
        kind = next((key for key in widths if f"{key}." in name), "norm")
        whole = widths.get(kind, (H,))
        found[f"double_blocks.0.{name}"] = whole if name.endswith("weight") else whole[:1]
    for block in range(2):
        start = f"single_blocks.{block}."
        found |= linear(f"{start}linear1", 7 * H, H) | linear(f"{start}linear2", H, 5 * H)
        found |= {f"{start}norm.{kind}_norm.scale": (H,) for kind in ("query", "key")}
        if has_modulation:
            found |= linear(f"{start}modulation.lin", 3 * H, H)
    if has_modulation:
        for side in ("img", "txt"):
            found |= linear(f"double_blocks.0.{side}_mod.lin", 6 * H, H)
        found |= linear("final_layer.adaLN_modulation.1", 2 * H, H)
    return found


def linear(name: str, given: int, taken: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (given, taken), f"{name}.bias": (given,)}


def flux_shapes(takes_guidance: bool) -> dict[str, tuple[int, ...]]:
    found = packed_shapes(has_modulation=True)
    for name, taken in (("time_in", 256), ("vector_in", WIDTH), ("guidance_in", 256)):
        if name != "guidance_in" or takes_guidance:
            found |= linear(f"{name}.in_layer", H, taken) | linear(f"{name}.out_layer", H, H)
    return found


def chroma_shapes() -> dict[str, tuple[int, ...]]:
    found = packed_shapes(has_modulation=False)
    start = "distilled_guidance_layer."
    found |= linear(f"{start}in_proj", 16, 16) | linear(f"{start}out_proj", H, 16)
    for layer in range(2):
        found |= linear(f"{start}layers.{layer}.in_layer", 16, 16)
        found |= linear(f"{start}layers.{layer}.out_layer", 16, 16)
        found[f"{start}norms.{layer}.scale"] = (16,)
    return found


def sd3_shapes() -> dict[str, tuple[int, ...]]:
    width, joint = 64, sd3.JOINT_WIDTH
    found: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 24 * 24, width),
        "x_embedder.proj.weight": (width, 16, 2, 2),
        "x_embedder.proj.bias": (width,),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("context_embedder", width, joint),
        **linear("y_embedder.mlp.0", width, 2 * WIDTH),
        **linear("y_embedder.mlp.2", width, width),
        **linear("final_layer.linear", 64, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    for block in range(2):
        for side in ("x_block", "context_block"):
            start, is_last = f"joint_blocks.{block}.{side}.", (block, side) == (1, "context_block")
            modulations = 2 if is_last else 9 if (block, side) == (0, "x_block") else 6
            found |= linear(f"{start}attn.qkv", 3 * width, width)
            found |= linear(f"{start}adaLN_modulation.1", modulations * width, width)
            found |= {f"{start}attn.ln_{kind}.weight": (64,) for kind in "qk"}
            if not is_last:
                found |= linear(f"{start}attn.proj", width, width)
                found |= linear(f"{start}mlp.fc1", 4 * width, width)
                found |= linear(f"{start}mlp.fc2", width, 4 * width)
    start = "joint_blocks.0.x_block.attn2."
    found |= linear(f"{start}qkv", 3 * width, width) | linear(f"{start}proj", width, width)
    return found | {f"{start}ln_{kind}.weight": (64,) for kind in "qk"}


def z_image_tensors(transformer: Any) -> dict[str, Tensor]:
    """Returns the tensors of a Z-Image transformer, which differ in few names."""
    names = {
        "all_final_layer.2-1.": "final_layer.",
        "all_x_embedder.2-1.": "x_embedder.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_k.": ".attention.k_norm.",
        ".attention.norm_q.": ".attention.q_norm.",
    }
    state, found = transformer.state_dict(), dict[str, Tensor]()
    for name, tensor in state.items():
        if ".attention.to_q." in name:
            parts = [state[name.replace("to_q", f"to_{kind}")] for kind in "qkv"]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            for new, old in names.items():
                name = name.replace(new, old)
            found[name] = tensor
    return {**found, "norm_final.weight": torch.ones(8)}


def inverted(
    shapes: Mapping[str, tuple[int, ...]], convert: Callable[..., Any], transformer: Any
) -> dict[str, Tensor]:
    """Returns the original tensors from which a conversion makes those of a transformer.

    A conversion moves elements, so that the numbers of the elements show where each one goes.
    """
    numbers, first = {}, 0
    for name, shape in shapes.items():
        size = int(torch.tensor(shape).prod())
        numbers[name] = torch.arange(first, first + size).reshape(shape)
        first += size
    flat = torch.full((first,), torch.nan)
    state = transformer.state_dict()
    converted = convert(checkpoint=dict(numbers), config=transformer.config)
    assert converted.keys() == state.keys()
    for name, places in converted.items():
        flat[places.flatten()] = state[name].flatten()
    assert not flat.isnan().any()
    return {name: flat[number.flatten()].reshape(number.shape) for name, number in numbers.items()}


@pytest.fixture
def _small_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets diffusers convert small transformers: it has the width of the published ones as a
    number in its code.
    """
    for class_name in ("FluxTransformer2DModel", "ChromaTransformer2DModel"):
        mapping = MAPPINGS[class_name]
        source = textwrap.dedent(inspect.getsource(mapping["checkpoint_mapping_fn"]))
        assert source.count("inner_dim = 3072") == 1
        scope = dict(vars(single_file_utils))
        exec(source.replace("inner_dim = 3072", f"inner_dim = {H}"), scope)
        changed = scope[mapping["checkpoint_mapping_fn"].__name__]
        monkeypatch.setitem(mapping, "checkpoint_mapping_fn", changed)


def write_flux(folder: Path, takes_guidance: bool) -> dict[str, Tensor]:
    scheduler = DYNAMIC_SHIFT if takes_guidance else {"shift": 1.0}
    flux.write(folder, takes_guidance=takes_guidance, scheduler=scheduler)
    options = {"pooled_projection_dim": WIDTH, "guidance_embeds": takes_guidance}
    transformer = lively(diffusers.FluxTransformer2DModel(**PACKED, **options), 1.5)
    transformer.save_pretrained(folder / "transformer")
    convert = MAPPINGS["FluxTransformer2DModel"]["checkpoint_mapping_fn"]
    return inverted(flux_shapes(takes_guidance), convert, transformer)


def write_chroma(folder: Path) -> dict[str, Tensor]:
    chroma.write(folder, scheduler=DYNAMIC_SHIFT)
    options = {f"approximator_{name}": 16 for name in ("num_channels", "hidden_dim")}
    transformer = lively(
        diffusers.ChromaTransformer2DModel(**PACKED, **options, approximator_layers=2), 1.5
    )
    transformer.save_pretrained(folder / "transformer")
    convert = MAPPINGS["ChromaTransformer2DModel"]["checkpoint_mapping_fn"]
    return inverted(chroma_shapes(), convert, transformer)


def write_sd3(folder: Path) -> dict[str, Tensor]:
    sd3.write(folder, scheduler={"shift": 3.0})
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=1,
        joint_attention_dim=sd3.JOINT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    lively(transformer).save_pretrained(folder / "transformer")
    convert = MAPPINGS["SD3Transformer2DModel"]["checkpoint_mapping_fn"]
    tensors = inverted(sd3_shapes(), convert, transformer)
    changes = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0609}
    vae = autoencoder_model(1.5305, latent_channels=16, **changes)
    vae.save_pretrained(folder / "vae")
    tensors = {f"model.diffusion_model.{name}": it for name, it in tensors.items()}
    return {**tensors, **autoencoder_tensors(vae)}


def write_z_image(folder: Path) -> dict[str, Tensor]:
    z_image.write(folder, shift=3.0)
    transformer = diffusers.ZImageTransformer2DModel(
        dim=128, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=TEXT_WIDTH
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    lively(transformer).save_pretrained(folder / "transformer")
    return z_image_tensors(transformer)


WRITERS: dict[str, tuple[str, Callable[[Path], dict[str, Tensor]]]] = {
    "flux-dev": ("flux", lambda folder: write_flux(folder, True)),
    "flux-schnell": ("flux", lambda folder: write_flux(folder, False)),
    "chroma": ("chroma", write_chroma),
    "sd3.5": ("sd3", write_sd3),
    "z-image-turbo": ("z_image", write_z_image),
}


def written(kind: str, place: Path) -> tuple[Path, Path]:
    """Returns a single file, and a folder of parts without its denoiser."""
    family, write = WRITERS[kind]
    torch.manual_seed(21)
    tensors = write(place / family)
    file = place / f"{kind}.safetensors"
    save_file({name: it.contiguous().clone() for name, it in tensors.items()}, file)
    return file, place


def image(denoiser: DiffusersDenoiser, guidance_scale: float) -> Any:
    wanted = job(
        scheduler="flow_match_euler", init_image=blocks(64, 80), guidance_scale=guidance_scale
    )
    with running(denoiser) as engine:
        return images(run(engine, wanted))[0]


@pytest.mark.usefixtures("_small_widths")
@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_a_single_file_gives_the_images_of_the_stock_loader(kind: str, tmp_path: Path) -> None:
    file, parts = written(kind, tmp_path)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    folder = find_model(str(parts / WRITERS[kind][0]))
    index = folder.files.index
    transformer = getattr(diffusers, index["transformer"][1]).from_single_file(
        str(file), config=str(folder.path), subfolder="transformer"
    )
    pipeline_class = getattr(diffusers, folder.family.pipelines[folder.files.class_name])
    stock = pipeline_class.from_pretrained(str(folder.path), transformer=transformer)
    cpu, options = torch.device("cpu"), ModelOptions(model_parts_dir=parts)
    ours = DiffusersDenoiser.load(str(file), cpu, torch.float32, options)
    spec = read_model_spec(str(file))

    found, expected = (image(it, spec.guidance_scale) for it in (ours, DiffusersDenoiser(stock)))
    assert difference(found, expected) <= BOUND
    assert found.std() > 10, "the image has contrast"
    described = read_model_spec(str(folder.path))
    for field in ("family", "num_inference_steps", "guidance_scale", "scheduler", "max_side"):
        assert getattr(spec, field) == getattr(described, field), field


@pytest.mark.usefixtures("_small_widths")
def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    file, parts = written("flux-dev", tmp_path)
    (parts / "flux" / "text_encoder_2").rename(parts / "other")
    cpu = torch.device("cpu")
    with pytest.raises(ModelError, match=r"does not hold the text_encoder .* IMG2IMG_MODEL_PARTS"):
        DiffusersDenoiser.load(str(file), cpu, torch.float32)
    sentence = r"does not hold the text_encoder_2 \(T5EncoderModel\), and there is no folder"
    options = ModelOptions(model_parts_dir=parts)
    with pytest.raises(ModelError, match=sentence):
        DiffusersDenoiser.load(str(file), cpu, torch.float32, options)


@pytest.mark.usefixtures("_small_widths")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("text_encoders.clip_l.x", "would be ignored"),
        ("cond_stage_model.x", "holds text encoders in a layout that is not read"),
        ("double_blocks.0.img_attn.new.weight", "of 3 elements that are of no layer"),
        ("adapter.weight", "of 3 elements that are of no layer"),
    ],
    ids=["text", "older-text", "layer", "other"],
)
def test_tensors_that_would_be_ignored_are_refused(
    name: str, sentence: str, tmp_path: Path
) -> None:
    file, parts = written("flux-dev", tmp_path)
    save_file({**load_file(file), name: torch.ones(3)}, file)
    options = ModelOptions(model_parts_dir=parts)

    with pytest.raises(ModelError, match=sentence):
        DiffusersDenoiser.load(str(file), torch.device("cpu"), torch.float32, options)


@pytest.mark.usefixtures("_small_widths")
def test_names_may_have_a_short_beginning_and_a_kontext_model_is_refused(tmp_path: Path) -> None:
    file, parts = written("flux-dev", tmp_path)
    short = {f"diffusion_model.{name}": it for name, it in load_file(file).items()}
    save_file(short, tmp_path / "short.safetensors")
    save_file(short, tmp_path / "flux1-dev-kontext_fp8.safetensors")
    cpu, options = torch.device("cpu"), ModelOptions(model_parts_dir=parts)
    found, expected = (
        DiffusersDenoiser.load(str(it), cpu, torch.float32, options)._model.network.state_dict()
        for it in (tmp_path / "short.safetensors", file)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ModelError, match=r"is FLUX\.1 Kontext by its name"):
        read_model_spec(str(tmp_path / "flux1-dev-kontext_fp8.safetensors"))


# The names of text encoders in ComfyUI, by family and part.
COMFY: dict[str, dict[str, str]] = {
    "flux-dev": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "sd3.5": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "chroma": {"text_encoder": "t5xxl"},
    "z-image-turbo": {"text_encoder": "qwen3_4b"},
}
FILES = {
    "clip_l": "clip_l.safetensors",
    "clip_g": "clip_g.safetensors",
    "t5xxl": "t5xxl_fp8_e4m3fn.safetensors",
    "qwen3_4b": "qwen_3_4b.safetensors",
}
FP8 = torch.float8_e4m3fn


def rewritten(folder: Path, kind: str) -> dict[str, Tensor]:
    """Rewrites a text encoder with the options of published ones that no shape shows, and T5 with
    weights that 8 bits can hold. Returns its tensors as files of ComfyUI have them.
    """
    config = json.loads((folder / "config.json").read_text())
    if kind.startswith("clip"):
        # The tokenizer is that of the package.
        tokenizer = clip_tokenizer("!" if kind == "clip_g" else "")
        tokenizer.save_pretrained(
            folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
        )
        changes = {"intermediate_size": 2 * WIDTH, "num_attention_heads": 1}
        encoder_class = getattr(transformers, config["architectures"][0])
        encoder_class(clip_config(WIDTH, **changes)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
    if kind == "qwen3_4b":
        config |= {"rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = getattr(transformers, config["architectures"][0]).from_pretrained(folder)
    if kind == "t5xxl":
        for parameter in encoder.parameters():
            parameter.data = parameter.data.to(FP8).float()
    encoder.save_pretrained(folder)
    if kind.startswith("clip"):
        return {**clip_tensors(encoder, ""), "logit_scale": torch.ones(())}
    start = "model." if kind == "qwen3_4b" else ""
    return {f"{start}{name}": it for name, it in encoder.state_dict().items()}


@pytest.mark.usefixtures("_small_widths")
@pytest.mark.parametrize("is_new", [True, False], ids=["newer", "older"])
@pytest.mark.parametrize("kind", ["flux-dev", "sd3.5"])
def test_a_denoiser_in_8_bits_with_factors_gives_the_image_of_its_weights(
    kind: str, is_new: bool, tmp_path: Path
) -> None:
    file, parts = written(kind, tmp_path)
    tensors = load_file(file)
    small = {key: (it * 2).to(FP8) for key, it in tensors.items() if it.ndim == 2}
    save_file(tensors | {key: it.float() / 2 for key, it in small.items()}, file)
    cpu, options = torch.device("cpu"), ModelOptions(model_parts_dir=parts)
    expected = image(DiffusersDenoiser.load(str(file), cpu, torch.float32, options), 3.0)
    for key in [*small]:
        name = "weight_scale" if is_new else "scale_weight"
        small |= {f"{key.removesuffix('weight')}{name}": torch.tensor(0.5)}
        if not is_new:
            small |= {f"{key.removesuffix('weight')}scale_input": torch.tensor(1.0)}
    if not is_new:
        start = "model.diffusion_model." if kind == "sd3.5" else ""
        small[f"{start}scaled_fp8"] = torch.zeros(2, dtype=FP8)
    save_file(tensors | small, file)

    found = image(DiffusersDenoiser.load(str(file), cpu, torch.float32, options), 3.0)
    assert difference(found, expected) == 0
    assert expected.std() > 10, "the image has contrast"


def scaled(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns T5 in 8 bits with factors, in the newer form of ComfyUI."""
    form = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    found: dict[str, Tensor] = {}
    for key, it in own.items():
        found[key] = it
        if key.endswith(".weight") and it.ndim == 2 and it.abs().max() < 200:
            found[key] = (it * 2).to(FP8)
            found |= {f"{key}_scale": torch.tensor(0.5)}
            found |= {f"{key.removesuffix('weight')}comfy_quant": form}
    assert len(found) > len(own)
    return found


@pytest.mark.usefixtures("_small_widths")
@pytest.mark.parametrize("are_inside", [True, False], ids=["inside", "files"])
@pytest.mark.parametrize("kind", sorted(COMFY))
def test_text_encoders_in_the_layout_of_comfyui_give_the_same_image(
    kind: str, are_inside: bool, tmp_path: Path
) -> None:
    file, parts = written(kind, tmp_path)
    folder = parts / WRITERS[kind][0]
    found = {name: rewritten(folder / part, name) for part, name in COMFY[kind].items()}
    cpu, options = torch.device("cpu"), ModelOptions(model_parts_dir=parts)
    expected = image(DiffusersDenoiser.load(str(file), cpu, torch.float32, options), 3.0)
    for part in COMFY[kind]:
        shutil.rmtree(folder / part)
    if are_inside:
        tensors = load_file(file)
        if kind != "sd3.5":
            tensors = {f"model.diffusion_model.{name}": it for name, it in tensors.items()}
        for name, own in found.items():
            start = f"text_encoders.{name}."
            for key, it in (scaled(own) if name == "t5xxl" else own).items():
                inner = "" if key == "logit_scale" else "transformer."
                tensors[f"{start}{inner}{key}"] = it.contiguous().clone()
        save_file(tensors, file)
    else:
        for name, own in found.items():
            dtype = FP8 if name == "t5xxl" else torch.float32
            place = parts if name == "t5xxl" else folder
            tensors = {key: it.to(dtype).contiguous().clone() for key, it in own.items()}
            save_file(tensors, place / FILES[name])

    ours = image(DiffusersDenoiser.load(str(file), cpu, torch.float32, options), 3.0)
    assert difference(ours, expected) == 0
    assert expected.std() > 10, "the image has contrast"


@pytest.mark.usefixtures("_small_widths")
def test_an_autoencoder_in_a_file_gives_the_same_image(tmp_path: Path) -> None:
    file, parts = written("flux-dev", tmp_path)
    changes = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159}
    vae = autoencoder_model(0.3611, latent_channels=16, **changes)
    vae.save_pretrained(parts / "flux/vae")
    cpu, options = torch.device("cpu"), ModelOptions(model_parts_dir=parts)
    expected = image(DiffusersDenoiser.load(str(file), cpu, torch.float32, options), 3.0)
    shutil.rmtree(parts / "flux/vae")
    tensors = autoencoder_tensors(vae, "")
    save_file({key: it.contiguous() for key, it in tensors.items()}, parts / "flux/ae.safetensors")

    ours = image(DiffusersDenoiser.load(str(file), cpu, torch.float32, options), 3.0)
    assert difference(ours, expected) == 0


@pytest.mark.usefixtures("_small_widths")
def test_the_room_of_a_single_file_includes_its_other_parts(tmp_path: Path) -> None:
    file, parts = written("flux-dev", tmp_path)
    cpu = torch.device("cpu")
    options = EngineOptions(model=str(file), model_parts_dir=parts)
    model = find_model(str(file))
    loaded = DiffusersDenoiser.load(model, cpu, torch.float32, options)
    needed = sum(part.bytes for part in loaded.parts)
    # Buffers of the modules, such as positions, are not in the files.
    size = weights_size(model, options, cpu)
    assert 0 <= needed - size < 0.02 * needed
    # The autoencoder in a folder of its own is counted in place of that of the parts.
    own = replace(options, vae_dir=parts / "flux")
    (parts / "flux/vae").rename(parts / "flux/ours")
    without = weights_size(model, options, cpu)
    (parts / "flux/ours").rename(parts / "flux/vae")
    assert weights_size(model, own, cpu) == size > without
    (parts / "flux/vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as error:
        weights_size(model, options, cpu)
    assert error.value.setting == "model_parts_dir"


@pytest.mark.usefixtures("_small_widths")
def test_stable_diffusion_3_is_served_without_t5_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, parts = written("sd3.5", tmp_path)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(parts / "sd3" / part)
    cpu, options = torch.device("cpu"), ModelOptions(model_parts_dir=parts)
    assert image(DiffusersDenoiser.load(str(file), cpu, torch.float32, options), 3.0).std() > 10
    assert "part_left_out: text_encoder_3" in caplog.text
    assert "part_left_out: tokenizer_3" in caplog.text


@pytest.mark.usefixtures("_small_widths")
def test_a_file_with_the_name_of_a_text_encoder_must_hold_one(tmp_path: Path) -> None:
    file, parts = written("flux-dev", tmp_path)
    shutil.rmtree(parts / "flux/text_encoder")
    save_file({"a": torch.ones(1)}, parts / "clip_l.safetensors")
    options = ModelOptions(model_parts_dir=parts)
    with pytest.raises(ModelError, match=r"clip_l\.safetensors has the name of a text_encoder"):
        DiffusersDenoiser.load(str(file), torch.device("cpu"), torch.float32, options)
    save_file(
        {"text_model.embeddings.token_embedding.weight": torch.ones(54, 16)},
        parts / "clip_l.safetensors",
    )
    with pytest.raises(ModelError, match=r"clip_l\.safetensors is incomplete: it lacks the tensor"):
        DiffusersDenoiser.load(str(file), torch.device("cpu"), torch.float32, options)
