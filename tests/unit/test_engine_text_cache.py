"""The cache of encoded prompts: what it keeps, and how many bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")

from img2img_server.engine.denoiser import TextInput  # noqa: E402
from img2img_server.engine.diffusers import text  # noqa: E402
from img2img_server.engine.diffusers.families.base import LoadedModel  # noqa: E402
from img2img_server.engine.diffusers.families.sd import StableDiffusion  # noqa: E402
from img2img_server.engine.options import TextEncoderPlacement  # noqa: E402

PROMPT_BYTES = 1000


class Encodes(StableDiffusion):
    """A family whose encoder notes what it encodes."""

    tokenizers: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Any]]:
        self.encoded += prompts
        return [{"tokens": torch.zeros(PROMPT_BYTES, dtype=torch.uint8)} for _ in prompts]


def encoder(family: Encodes) -> text.TextEncoder:
    model = LoadedModel(
        pipeline=SimpleNamespace(components={}),
        network=SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=None)),
        device=torch.device("cpu"),
        dtype=torch.float32,
        memory_format=torch.contiguous_format,
    )
    return text.TextEncoder(model, family, TextEncoderPlacement.DEVICE)


def encode(encoder: text.TextEncoder, *prompts: str) -> None:
    inputs = [
        TextInput(prompt=prompt, negative_prompt="", guidance_scale=1.0, height=64, width=64)
        for prompt in prompts
    ]
    assert len(encoder.encode(inputs, [1] * len(inputs))) == len(prompts)


def test_prompts_used_last_are_kept_up_to_the_limit_of_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "_CACHE_BYTES", 3 * PROMPT_BYTES)
    cache = encoder(family := Encodes())
    encode(cache, "a", "b", "c")
    encode(cache, "a")  # is the latest now
    encode(cache, "d")
    assert family.encoded == ["a", "b", "c", "d"]
    encode(cache, "a", "c", "d")
    assert family.encoded == ["a", "b", "c", "d"]
    encode(cache, "b")
    assert family.encoded == ["a", "b", "c", "d", "b"]


def test_prompts_larger_than_the_cache_are_encoded_once_a_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "_CACHE_BYTES", PROMPT_BYTES // 2)
    cache = encoder(family := Encodes())
    encode(cache, "a", "b", "a")
    assert family.encoded == ["a", "b"]
    encode(cache, "a")  # the one used last
    assert family.encoded == ["a", "b"]
