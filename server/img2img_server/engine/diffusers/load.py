"""Loads a pipeline of diffusers and makes it as fast as the options say."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from img2img_server.engine.model_spec import ModelError
from img2img_server.engine.options import Compile, ModelOptions, TinyVaeUse

_log = logging.getLogger(__name__)

_MOST_SHAPES = 4096  # sizes x sizes of batches x kinds of block


def load_pipeline(
    source: str, device: torch.device, dtype: torch.dtype, options: ModelOptions
) -> tuple[Any, Any]:
    """An image-to-image pipeline of a directory or hub id, and the tiny autoencoder of previews.

    fp16 files are widened where dtype says so. The autoencoder is None when there is none.

    Raises:
        ModelError: it cannot be loaded, is of another family, or nothing can be compiled here.
    """
    for quiet in (diffusers_logging, transformers_logging):
        quiet.set_verbosity_error()  # they would log prompts that are too long
        quiet.disable_progress_bar()
    # Only now: the import alone logs what none of our models needs.
    from diffusers import AutoPipelineForImage2Image

    if options.compile is not Compile.OFF:  # before what takes long
        _try_compiler(device, options.compile)
    try:
        tiny = _tiny(options.tiny_vae, dtype)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {options.tiny_vae}: {error}", setting="tiny_vae") from error
    try:
        pipeline = AutoPipelineForImage2Image.from_pretrained(  # type: ignore[no-untyped-call]
            source, dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load {source}: {error}") from error
    if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
        raise ModelError(f"{source} is not of the Stable Diffusion or SDXL family")
    if tiny is not None and options.tiny_vae_use is TinyVaeUse.PICTURES:
        pipeline.vae, tiny = tiny, None
    pipeline.to(device)
    if options.channels_last:
        for part in filter(None, (pipeline.unet, pipeline.vae, tiny)):
            part.to(memory_format=torch.channels_last)
    if dtype == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)  # it overflows in half precision
    return pipeline, tiny.to(device) if tiny is not None else None


def accelerate(pipeline: Any, options: ModelOptions) -> None:
    """Fuses and compiles the UNet. What is compiled is built when a shape first comes up."""
    unet = pipeline.unet
    if options.fuse_qkv:
        unet.fuse_qkv_projections()
    if options.compile is Compile.OFF:
        return
    # On a GPU each shape is captured as a CUDA graph: one launch a step.
    graphs = {"mode": "reduce-overhead"} if unet.device.type == "cuda" else {}
    if options.compile is Compile.REGIONAL:
        # Graphs of many small regions would cost more launches than they save.
        unet.compile_repeated_blocks(dynamic=False)
    else:
        unet.compile(dynamic=False, **graphs)


def admit_shapes() -> None:
    """Lets the thread that calls compile as many shapes as come up; torch keeps the limit a thread.

    Every shape in use is compiled before the worker is ready: none may push another one out, nor
    run as it is because there are too many.
    """
    config = torch._dynamo.config
    if config.recompile_limit != _MOST_SHAPES:
        config.recompile_limit = config.accumulated_recompile_limit = _MOST_SHAPES


def _try_compiler(device: torch.device, wanted: Compile) -> None:
    """Compiles a line of code: jobs are no place to learn that there is no compiler."""
    try:
        line = torch.compile(lambda x: x.sin() + x, dynamic=False)
        line(torch.zeros(64, device=device))
    except Exception as error:  # of many kinds: no compiler, no headers, no Triton
        needs = "a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise ModelError(
            f"{wanted} needs {needs} on this machine (Debian: g++); "
            f"without one it must be off: {str(error).splitlines()[0]}",
            setting="compile",
        ) from error


def _tiny(source: str, dtype: torch.dtype) -> Any:
    if not source:
        return None
    return AutoencoderTiny.from_pretrained(source, torch_dtype=dtype)  # type: ignore[no-untyped-call]
