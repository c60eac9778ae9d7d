"""Describes a single-file checkpoint by the names and shapes of its tensors. Imports no torch.

The configuration of each part is derived from the shapes, so that it fits every model of the
architecture. Values that no shape shows, such as the width of attention heads, are those of the
published models; diffusers (Apache-2.0) has them as defaults of its classes or of its conversion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from img2img_server.engine.distillation import (
    ORIGINAL_TURBO,
    UNET_DISTILLATIONS,
    find_distillation,
)
from img2img_server.engine.family import ModelError, ModelFiles
from img2img_server.engine.file_kinds import kind_of_tensors
from img2img_server.engine.model_names import ModelName
from img2img_server.engine.tensor_names import DENOISER, HARMLESS_IN_CHECKPOINT, first_names

# In a file in 8 bits of ComfyUI, a tensor without values that says so.
SCALED_FP8: Final = "scaled_fp8"
Shapes = Mapping[str, tuple[int, ...]]
Value = TypeVar("Value")

UNET: Final = DENOISER
VAE: Final = "first_stage_model."
CLIP: Final = "cond_stage_model.transformer."  # Stable Diffusion 1.x
OPEN_CLIP: Final = "cond_stage_model.model."  # Stable Diffusion 2.x
XL_CLIP: Final = "conditioner.embedders.0.transformer."
XL_OPEN_CLIP: Final = "conditioner.embedders.1.model."
_REFINER_CLIP: Final = "conditioner.embedders.0.model."

_SD_BETAS: Final[Mapping[str, Any]] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_HEAD_WIDTH: Final = 64
_OPEN_CLIP_LAYERS: Final = 24  # of the text encoder of Stable Diffusion 2.x
_FOUR_BITS: Final = re.compile(r"\.((nested_)?absmax|quant_map|weight_scale_2)$|\.quant_state\.")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a single file.

    Attributes:
        files: The files that a directory in diffusers' layout would have.
        prefixes: The beginning of the names of each part's tensors, by part. Parts that `files`
            names and the file does not hold are missing here.
    """

    files: ModelFiles
    prefixes: Mapping[str, str]

    def held(self, tensors: Mapping[str, Value], part: str) -> dict[str, Value]:
        """Returns those of a file's tensors, by their full names, that are of a part."""
        prefix = self.prefixes[part]
        others = tuple(it for it in self.prefixes.values() if len(it) > len(prefix))
        return {
            name: value
            for name, value in tensors.items()
            if name.startswith(prefix) and not name.startswith(others)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """Facts about a checkpoint that its tensors do not show.

    Attributes:
        names: The path of the file and the other names of the model.
        prediction_type: `epsilon` or `v_prediction`; empty: not known.
        resolution: The side of the training images in pixels; 0: not known.
    """

    names: tuple[str, ...]
    prediction_type: str = ""
    resolution: int = 0

    @classmethod
    def of(
        cls, names: tuple[str, ...], metadata: Mapping[str, str], prediction_type: str = ""
    ) -> Hints:
        """Returns the hints in the metadata of a safetensors file (the standard ModelSpec)."""
        given = metadata.get("modelspec.prediction_type", "").lower()
        kinds = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
        side = re.match(r"\d+", metadata.get("modelspec.resolution", ""))
        return cls(
            names=(*names, metadata.get("modelspec.title", "")),
            prediction_type=prediction_type or kinds.get(given, ""),
            resolution=int(side[0]) if side else 0,
        )

    @property
    def known_names(self) -> tuple[ModelName, ...]:
        """The names that are not empty."""
        return tuple(ModelName.of(name) for name in self.names if name)

    def says(self, pattern: str) -> bool:
        """Returns whether one of the names has words, see `ModelName.has`."""
        return any(name.has(pattern) for name in self.known_names)


def describe_unet(shapes: Shapes, hints: Hints, place: str) -> Checkpoint:
    """Returns the contents of a file of Stable Diffusion 1.x, 2.x or XL.

    Args:
        place: The path of the file, for sentences.

    Raises:
        ModelError: The file is no checkpoint that can be served, or has tensors that would be
            ignored.
    """
    check_bits(shapes, place)
    # A ControlNet has no output blocks; a UNet without its last layer is reported as incomplete.
    has_outputs = any(name.startswith(f"{UNET}output_blocks.") for name in shapes)
    if f"{UNET}input_blocks.0.0.weight" not in shapes or not has_outputs:
        unknown = (
            "is no checkpoint of a layout that is known here, by its tensors "
            f"{first_names(shapes)}: use a directory in diffusers' layout"
        )
        raise ModelError(f"{place} {kind_of_tensors(shapes.keys()) or unknown}")
    if "edm_mean" in shapes:
        raise ModelError(
            f"{place} is an EDM model (Playground 2.5) in a single file, which is not served: use "
            "its directory in diffusers' layout"
        )
    found = _stable_diffusion(shapes, hints)
    check_known(shapes, found, place)
    return found


@contextmanager
def complete(place: str) -> Iterator[None]:
    """Turns the error of a body that describes tensors which are not all there into a sentence."""
    try:
        yield
    except KeyError as error:
        raise ModelError(
            f"{place} is incomplete: it lacks the tensor {error.args[0]}: fetch the file again"
        ) from error
    except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{place} has tensors of other shapes than its architecture ({error}): use another file"
        ) from error


def check_known(shapes: Shapes, found: Checkpoint, place: str) -> None:
    """Raises ModelError if a file has tensors that are of no part of its model."""
    known = tuple(found.prefixes.values())
    unknown = [
        name
        for name in shapes
        if not name.startswith(known) and not HARMLESS_IN_CHECKPOINT.search(name)
        if name != SCALED_FP8
    ]
    if unknown:
        raise ModelError(
            f"{place} has tensors that are of no part of its model and would be ignored: "
            f"{first_names(unknown)}. Use a file without them"
        )


def check_bits(shapes: Shapes, place: str) -> None:
    """Raises ModelError for weights in 4 bits, in the forms of bitsandbytes and ComfyUI."""
    if small := [name for name in shapes if _FOUR_BITS.search(name)]:
        raise ModelError(
            f"{place} has weights in 4 bits ({small[0]}), which are not read: use the file in "
            "fp16, bf16 or fp8, and IMG2IMG_QUANTIZATION for 8 bits in memory"
        )


def _stable_diffusion(shapes: Shapes, hints: Hints) -> Checkpoint:
    """Describes Stable Diffusion 1.x, 2.x or XL in the layout of the original code."""
    is_xl = f"{UNET}label_emb.0.0.weight" in shapes
    projections = [shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight")]
    is_v2 = not is_xl and any(len(shape) == 2 for shape in projections)
    named = find_distillation(UNET_DISTILLATIONS, hints.known_names)
    prediction = hints.prediction_type
    if not prediction and "v_pred" in shapes:
        prediction = "v_prediction"
    is_turbo = named is not None and named.names is ORIGINAL_TURBO.names and not prediction
    resolution = hints.resolution
    if is_v2 and not prediction:
        # 2.x has models of 512 pixels that predict noise, and models of 768 that predict v.
        is_base = is_turbo or resolution == 512 or hints.says(r"\w*base|512\w*")
        prediction = "epsilon" if is_base else "v_prediction"
    prediction = prediction or "epsilon"
    side = resolution or (1024 if is_xl else 768 if is_v2 and prediction != "epsilon" else 512)
    if is_xl and is_turbo:
        side = 512
    unet = _unet(shapes, side, is_xl, is_v2)
    scheduler = _sd_scheduler(is_xl, is_v2, is_turbo, prediction)
    if named and named.scheduler_config:
        own = {"prediction_type": prediction}
        given = own if hints.prediction_type else {}
        scheduler = {**_SD_BETAS, **own, **named.scheduler_config, **given}
    if is_xl and "ztsnr" in shapes:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    configs: dict[str, Mapping[str, Any]] = {"unet": unet, "scheduler": scheduler}
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    prefixes = {"unet": UNET}
    if is_xl:
        index["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        index["tokenizer_2"] = ["transformers", "CLIPTokenizer"]
        index["force_zeros_for_empty_prompt"] = True
        texts = {"text_encoder": (XL_CLIP, 0), "text_encoder_2": (XL_OPEN_CLIP, 0)}
        if any(name.startswith(_REFINER_CLIP) for name in shapes):
            index["requires_aesthetics_score"] = True
            prefixes["refiner"] = _REFINER_CLIP
    elif is_v2:
        texts = {"text_encoder": (OPEN_CLIP, _unused_layers(shapes))}
    else:
        texts = {"text_encoder": (CLIP, 0)}
    if f"{VAE}decoder.conv_in.weight" in shapes:
        prefixes["vae"] = VAE
        configs["vae"] = autoencoder(shapes, VAE, 0.13025 if is_xl else 0.18215)
    for part, (prefix, unused) in texts.items():
        if config := clip_text(shapes, prefix, unused):
            prefixes[part] = prefix
            configs[part] = config
    return Checkpoint(ModelFiles(index, configs, hints.names), prefixes)


def _unused_layers(shapes: Shapes) -> int:
    """Returns how many layers of OpenCLIP's encoder in Stable Diffusion 2.x are not used: the last
    one, unless the file was converted from diffusers' layout, which does not have it.
    """
    layers = count(shapes, f"{OPEN_CLIP}transformer.resblocks.")
    if layers in (_OPEN_CLIP_LAYERS, _OPEN_CLIP_LAYERS - 1):
        return layers - (_OPEN_CLIP_LAYERS - 1)
    return int(f"{OPEN_CLIP}text_projection" in shapes)  # That belongs to the last layer.


def _sd_scheduler(is_xl: bool, is_v2: bool, is_turbo: bool, prediction: str) -> dict[str, Any]:
    """Returns the scheduler with which the base model was published."""
    found = {**_SD_BETAS, "prediction_type": prediction}
    if is_turbo:
        name = "EulerAncestralDiscreteScheduler" if is_xl else "EulerDiscreteScheduler"
        return {**found, "_class_name": name, "timestep_spacing": "trailing"}
    if is_xl:
        return {**found, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    if is_v2:
        return {**found, "_class_name": "DDIMScheduler"}
    return {**found, "_class_name": "PNDMScheduler", "skip_prk_steps": True}


def _unet(shapes: Shapes, side: int, is_xl: bool, is_v2: bool) -> Mapping[str, Any]:
    """Returns the configuration of a UNet."""
    levels: list[tuple[int, list[int]]] = [(0, [])]
    for block in range(1, count(shapes, f"{UNET}input_blocks.")):
        start = f"{UNET}input_blocks.{block}."
        if f"{start}0.op.weight" in shapes:
            levels.append((0, []))
            continue
        width = shapes[f"{start}0.out_layers.3.weight"][0]
        depth = count(shapes, f"{start}1.transformer_blocks.")
        levels[-1] = width, [*levels[-1][1], depth]
    widths = [width for width, _ in levels]
    depths = [max(found, default=0) for _, found in levels]
    cross = [shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")]
    is_linear = is_xl or is_v2
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side // 8,
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "down_block_types": ["CrossAttnDownBlock2D" if it else "DownBlock2D" for it in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if it else "UpBlock2D" for it in depths[::-1]],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0][1]),
        "cross_attention_dim": cross[0][1] if cross else 768,
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        # In diffusers, this name stands for the number of heads.
        "attention_head_dim": [width // _HEAD_WIDTH for width in widths] if is_linear else 8,
        "use_linear_projection": is_linear,
        "upcast_attention": is_v2 and side == 768,
    }
    if is_xl:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shapes[f"{UNET}label_emb.0.0.weight"][1],
        }
    return config


def autoencoder(
    shapes: Shapes, prefix: str, scaling_factor: float, shift_factor: float | None = None
) -> Mapping[str, Any]:
    """Returns the configuration of an AutoencoderKL in the layout of the original code."""
    levels = count(shapes, f"{prefix}encoder.down.")
    widths = [
        shapes[f"{prefix}encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)
    ]
    found: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count(shapes, f"{prefix}encoder.down.0.block."),
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "sample_size": 1024 if levels == 4 and shift_factor is not None else 512,
        "scaling_factor": scaling_factor,
        "use_quant_conv": f"{prefix}quant_conv.weight" in shapes,
        "use_post_quant_conv": f"{prefix}post_quant_conv.weight" in shapes,
    }
    return found if shift_factor is None else {**found, "shift_factor": shift_factor}


def clip_text(shapes: Shapes, prefix: str, unused_layers: int = 0) -> Mapping[str, Any] | None:
    """Returns the configuration of a CLIP text encoder; None if the file has none.

    Args:
        unused_layers: How many of the last layers diffusers does not have.
    """
    own = {
        name.removeprefix(prefix).removeprefix("text_model."): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
    if "token_embedding.weight" in own:  # OpenCLIP
        table, positions = own["token_embedding.weight"], own["positional_embedding"]
        layers = count(own, "transformer.resblocks.")
        inner, activation = own["transformer.resblocks.0.mlp.c_fc.weight"][0], "gelu"
        projection = own.get("text_projection", table)[1]
    elif "embeddings.token_embedding.weight" in own:
        table = own["embeddings.token_embedding.weight"]
        positions = own["embeddings.position_embedding.weight"]
        layers = count(own, "encoder.layers.")
        inner = own["encoder.layers.0.mlp.fc1.weight"][0]
        # The large encoder, which SD3 stores in this layout too, was trained by OpenCLIP.
        activation = "gelu" if table[1] >= 1024 else "quick_gelu"
        projection = own.get("text_projection.weight", table)[
            0 if "text_projection.weight" in own else 1
        ]
    else:
        return None
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": table[0],
        "hidden_size": table[1],
        "max_position_embeddings": positions[0],
        "num_hidden_layers": layers - unused_layers,
        "num_attention_heads": max(1, table[1] // _HEAD_WIDTH),
        "intermediate_size": inner,
        "hidden_act": activation,
        "projection_dim": projection,
        "bos_token_id": table[0] - 2,
        "eos_token_id": table[0] - 1,
        "pad_token_id": 1,
    }


def count(names: Iterable[str], prefix: str) -> int:
    """Returns the number of items in a list of blocks, whose names continue with their numbers."""
    numbers = {
        int(rest)
        for name in names
        if name.startswith(prefix) and (rest := name[len(prefix) :].partition(".")[0]).isdigit()
    }
    return max(numbers, default=-1) + 1
