"""Loads a pipeline of diffusers and makes it as fast as the options say."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny
from diffusers.quantizers.quantization_config import GGUFQuantizationConfig, TorchAoConfig
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from img2img_server.domain.hub_id import HubId
from img2img_server.domain.models import ModelKind
from img2img_server.engine.diffusers.families.base import UNUSED_PARTS, Family
from img2img_server.engine.diffusers.file_pages import leave_files, use_channels_last
from img2img_server.engine.diffusers.local_model import LocalModel
from img2img_server.engine.diffusers.parts import load_part, load_parts
from img2img_server.engine.diffusers.placement import log_parts, modules, place
from img2img_server.engine.diffusers.single_file import load_single_file
from img2img_server.engine.family import ModelError, ModelFiles, about_setting, read_json
from img2img_server.engine.hub import download_file
from img2img_server.engine.options import (
    Compile,
    ModelOptions,
    Quantization,
    TinyVaeUse,
    vae_folder,
)
from img2img_server.extras import install_command

_MOST_SHAPES = 4096  # limit of compiled shapes: image sizes x batch sizes x kinds of block


def load_pipeline(
    model: LocalModel,
    device: torch.device,
    dtype: torch.dtype,
    options: ModelOptions,
) -> tuple[Any, Any]:
    """Loads a pipeline, and the tiny autoencoder of previews if there is one.

    fp16 files are widened where dtype says so.

    Raises:
        ModelError: The model cannot be loaded, or cannot be compiled in this way or on this
            machine.
    """
    family = model.family
    if dtype == torch.float16 and not family.takes_float16:
        raise ModelError(
            f"models of the family {family.name} overflow in float16: use bfloat16, or float32",
            setting="dtype",
        )
    if options.group_offload and device.type == "cpu":
        raise ModelError("there is no GPU for group offloading", setting="group_offload")
    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()
    if family.lengths_vary and options.compile is Compile.WHOLE:
        raise ModelError(
            f"{model.files.class_name} takes prompts of any length: to compile its network as a "
            "whole would take minutes for each length; the setting must be regional or off",
            setting="compile",
        )
    if options.compile is not Compile.OFF:  # This check comes before the slow steps.
        _try_compiler(device, options.compile)
    tiny = load_tiny_vae(options.tiny_vae, dtype) if options.tiny_vae else None
    pipeline = _assemble(family, model, dtype, options)
    if tiny is not None and options.tiny_vae_use is TinyVaeUse.IMAGES:
        pipeline.vae, tiny = tiny, None
    if options.group_offload:  # Its hooks keep the tensors that they find.
        leave_files(getattr(pipeline, family.denoiser))
    place(pipeline, family.denoiser, device, options)
    for part in (*modules(pipeline).values(), tiny):  # Weights on a GPU are copies already.
        if part is not None:
            leave_files(part)
    if options.channels_last and family.kind is ModelKind.DIFFUSION:
        for part in filter(None, (getattr(pipeline, family.denoiser), pipeline.vae, tiny)):
            use_channels_last(part)
    if dtype == torch.float16 and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.to(torch.float32)  # The autoencoder overflows in half precision.
    log_parts(pipeline)
    return pipeline, tiny.to(device) if tiny is not None else None


def _assemble(family: Family, model: LocalModel, dtype: torch.dtype, options: ModelOptions) -> Any:
    """Loads all parts of a model and returns its pipeline."""
    files, given = model.files, dict(family.load_options)
    if options.gguf_file is not None:
        gguf = _read_gguf(family, files, str(model.path), dtype, options.gguf_file)
        given[family.denoiser] = gguf
    if options.vae_dir is not None:
        given["vae"] = _own_vae(options.vae_dir, files, dtype, options.allow_pickles)
    # diffusers imports its classes on first access.
    pipeline_class = getattr(diffusers, family.pipelines[files.class_name])
    quantization = _quantization(options.quantization)
    if model.checkpoint is not None:
        parts = load_single_file(
            family,
            model.checkpoint,
            model.path,
            dtype,
            given=given,
            parts_dir=options.model_parts_dir,
            quantization=quantization,
            allow_pickles=options.allow_pickles,
        )
        make, arguments = pipeline_class, dict.fromkeys(UNUSED_PARTS) | parts
        expected, optional = pipeline_class._get_signature_keys(pipeline_class)
        known = {*expected, *optional}
        arguments = {name: part for name, part in arguments.items() if name in known}
    else:
        parts = load_parts(
            family,
            files,
            model.path,
            dtype,
            given=given,
            quantization=quantization,
            allow_pickles=options.allow_pickles,
        )
        make = partial(pipeline_class.from_pretrained, str(model.path), dtype=dtype)
        arguments = parts
    try:
        return make(**arguments)
    except Exception as error:  # the library raises errors of many classes
        why = " ".join(str(error).split())
        raise ModelError(f"cannot load {model.path}: {why}") from error


def _own_vae(folder: Path, files: ModelFiles, dtype: torch.dtype, allow_pickles: bool) -> Any:
    """Returns the autoencoder of a folder, of the class that the model has."""
    entry = files.parts.get("vae", ("diffusers", "AutoencoderKL"))
    own = vae_folder(folder)
    if not own.is_dir():
        raise ModelError(
            f"{folder} has no config.json and no folder vae: fetch an autoencoder in diffusers' "
            "layout, with its config.json",
            setting="vae_dir",
        )
    with about_setting("vae_dir"):
        return load_part(own.name, entry, own.parent, dtype, None, allow_pickles)


def _quantization(wanted: Quantization) -> Any:
    """Returns the argument of from_pretrained that loads the denoiser with quantised weights.

    Raises:
        ModelError: A package is missing.
    """
    if wanted is Quantization.OFF:
        return None
    _need("torchao", "quantization")
    forms: Any = importlib.import_module("torchao.quantization")
    is_int8 = wanted is Quantization.INT8
    # Tensors of version 2 can be moved between devices.
    form = forms.Int8WeightOnlyConfig(version=2) if is_int8 else forms.Float8WeightOnlyConfig()
    return TorchAoConfig(form)


def _read_gguf(
    family: Family, files: ModelFiles, source: str, dtype: torch.dtype, file: Path
) -> Any:
    """Returns the denoiser with the weights of a GGUF file."""
    if not file.is_file():
        raise ModelError(f"there is no file {file}: correct the path", setting="gguf_file")
    _need("gguf", "gguf_file")
    network_class = getattr(diffusers, files.index[family.denoiser][1])
    if not hasattr(network_class, "from_single_file"):
        raise ModelError(f"{network_class.__name__} cannot be read from GGUF", setting="gguf_file")
    form = GGUFQuantizationConfig(compute_dtype=dtype)
    try:
        return network_class.from_single_file(
            str(file),
            quantization_config=form,
            config=source,
            subfolder=family.denoiser,
            torch_dtype=dtype,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"cannot load {file}: {error}", setting="gguf_file") from error


def _need(package: str, setting: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"needs the package {package}: {install_command('quantization')}", setting=setting
        )


def accelerate(
    network: Any, options: ModelOptions, lengths_vary: bool = False, *, can_fuse: bool = True
) -> None:
    """Fuses and compiles the denoiser. Compiled code is built at the first use of a shape.

    Args:
        lengths_vary: The network accepts prompts of any length, so its blocks are compiled once for
            all lengths.
        can_fuse: Whether diffusers computes the same images with fused projections.

    Raises:
        ModelError: The projections of the network cannot be fused.
    """
    if options.fuse_qkv:
        if not (can_fuse and hasattr(network, "fuse_qkv_projections")):
            raise ModelError(
                f"{type(network).__name__} cannot fuse its projections, so the setting must be off",
                setting="fuse_qkv",
            )
        network.fuse_qkv_projections()
    if options.compile is Compile.OFF:
        return
    # On a GPU each shape is captured as a CUDA graph: one launch a step.
    graphs = {"mode": "reduce-overhead"} if network.device.type == "cuda" else {}
    if options.compile is Compile.REGIONAL:
        if not getattr(network, "_repeated_blocks", None):
            # Some classes of diffusers do not name their repeated blocks.
            whole = network._no_split_modules or ()
            network._repeated_blocks = [name for name in whole if name.endswith("Block")]
        # Graphs of many small regions would add more launches than they save.
        network.compile_repeated_blocks(dynamic=lengths_vary)
    else:
        network.compile(dynamic=False, **graphs)


def admit_shapes() -> None:
    """Lets the calling thread compile any number of shapes; torch has one limit for each thread.
    The warm-up compiles every shape in use. With a limit, torch would evict compiled shapes, or run
    new ones uncompiled.
    """
    config = torch._dynamo.config
    if config.recompile_limit != _MOST_SHAPES:
        config.recompile_limit = config.accumulated_recompile_limit = _MOST_SHAPES


def _try_compiler(device: torch.device, wanted: Compile) -> None:
    """Compiles a line of code, so that a missing compiler is found before the first job."""
    try:
        line = torch.compile(lambda x: x.sin() + x, dynamic=False)
        line(torch.zeros(64, device=device))
    except Exception as error:
        # torch raises many types of errors: no compiler, no headers, no Triton.
        needs = "a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise ModelError(
            f"{wanted} needs {needs} on this machine (Debian: g++); "
            f"without a compiler the setting must be off: {str(error).splitlines()[0]}",
            setting="compile",
        ) from error


def load_tiny_vae(source: str, dtype: torch.dtype) -> Any:
    """Returns the tiny autoencoder of a folder or hub id.

    Raises:
        ModelError: It cannot be loaded, or is another autoencoder.
    """
    hub_id = None if Path(source).is_dir() else HubId.parse(source)
    with about_setting("tiny_vae"):
        file = (
            Path(source) / "config.json" if hub_id is None else download_file(hub_id, "config.json")
        )
        class_name = read_json(file).get("_class_name", "AutoencoderTiny")
        if class_name != "AutoencoderTiny":
            raise ModelError(
                f"{source} has an autoencoder of the class {class_name}, which is not a tiny one "
                "(AutoencoderTiny): name a tiny one, such as TAESD"
            )
    place = {} if hub_id is None else {"revision": hub_id.revision or None}
    try:
        return AutoencoderTiny.from_pretrained(  # type: ignore[no-untyped-call]
            source if hub_id is None else hub_id.repo, torch_dtype=dtype, **place
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {source}: {error}", setting="tiny_vae") from error
