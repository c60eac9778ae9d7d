"""The words of a prompt that the model of each family reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from img2img_server.engine.denoiser import TextEmbedding, TextInput
from tests.engine_bench import load
from tests.oracle.harness import families


def are_equal(one: TextEmbedding, other: TextEmbedding) -> bool:
    return all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("family", families())
def test_the_warning_about_a_long_prompt_counts_the_tokens_that_are_read(
    family: str, tmp_path: Path
) -> None:
    model = next(iter(families()[family].values()))
    denoiser = load(model.write(tmp_path))

    def encode(prompt: str) -> TextEmbedding:
        text = TextInput(prompt=prompt, negative_prompt="", guidance_scale=1.0, height=64, width=64)
        with torch.inference_mode():
            return denoiser.encode_texts([text])[0].prompt

    # The tokenizers of the small models know single letters only.
    letters = 2000
    whole = encode("a" * letters)
    kept, tokens = map(int, re.findall(r"[0-9]+", whole.warning)[:2])
    read = kept - (tokens - letters)  # Some tokenizers insert a token before the first letter.
    last_read, first_unread = ("a" * place + "b" * (letters - place) for place in (read - 1, read))

    assert are_equal(encode(first_unread), whole)
    assert not are_equal(encode(last_read), whole)
    assert encode("a" * read).warning == ""
    assert encode("a" * (read + 1)).warning
