"""Parts of small flow-matching models with random weights, which several families share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from img2img_server.engine.base import EngineJob
from tests.engine_bench import stock_call
from tests.tiny_models import perturb_norms, vivid

T5_WIDTH, T5_LENGTH = 16, 24
DYNAMIC_SHIFT: dict[str, Any] = {"use_dynamic_shifting": True, "shift": 3.0}


# Heights and widths. None is square, and none has two multiples of 64.
SIZES = ((64, 80), (80, 112), (112, 48))


def sized_call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of a stock pipeline whose default size is not the init image's, with
    the length of these prompts."""
    height, width, _ = wanted.init_image.shape
    return {
        **stock_call(wanted),
        "height": height,
        "width": width,
        "max_sequence_length": T5_LENGTH,
    }


def autoencoder(channels: int = 16) -> Any:
    """Returns an autoencoder with a shift, as in FLUX.1 and Stable Diffusion 3."""
    blocks = 4
    found = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vivid(found)


def t5_tokenizer() -> Any:
    """Returns a tokenizer that knows single letters only."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def t5_encoder(tokenizer: Any, width: int = T5_WIDTH) -> Any:
    """Returns a T5 encoder of two blocks."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config).eval()
    perturb_norms(encoder)
    return encoder


@torch.no_grad()
def lively(transformer: Any, factor: float = 3.0) -> Any:
    """Strengthens the attention, whose effect is small with random weights, so that a prompt has an
    effect. Moves norms away from their initial values.
    """
    perturb_norms(transformer)
    for name, parameter in transformer.named_parameters():
        if "attn" in name and parameter.ndim == 2:
            parameter *= factor
    return transformer.eval()
