"""Small models of the Qwen kind with random weights: language models as text encoders, and the
autoencoder of Qwen-Image.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from tests.tiny_models import perturb_norms

TEXT_WIDTH = 16
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system message of the pipelines after its first 17 letters. With it, the message has as many
# tokens as with the real tokenizer, and the pipelines drop exactly these.
_REST = (
    "e by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)


def qwen_tokenizer() -> Any:
    """Returns a tokenizer that knows single bytes and the tokens of chats."""
    tokens = [*_SPECIAL, *sorted(ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=2048)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def describing_tokenizer() -> Any:
    """Returns a tokenizer for pipelines that ask for the description of an image."""
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens([_REST])
    return tokenizer


def text_options(tokenizer: Any) -> dict[str, Any]:
    """Returns the configuration of a text model with two layers before the last one."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }


@torch.no_grad()
def video_autoencoder() -> Any:
    """Returns the autoencoder of Qwen-Image, 16 channels and 8 pixels per latent."""
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1)
    for part in (vae.encoder, vae.decoder):
        perturb_norms(part)
    image = vae.decode(torch.randn(1, 16, 1, 8, 8)).sample
    vae.decoder.conv_out.weight *= 0.5 / image.std()
    return vae.eval()
