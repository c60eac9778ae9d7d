"""Prompts of unusual forms: no form fails, and the words that are not read are announced."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from img2img_server.domain.params import JobParams, ValidationContext, validate
from img2img_server.engine.denoiser import Conditioning, TextInput
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.windows import max_chunks
from tests.engine_bench import load
from tests.oracle.harness import models
from tests.tiny_models import LENGTH, write_sd, write_sdxl

WRITERS = {"sd": write_sd, "sdxl": write_sdxl, "flux": models()["flux dev"].write}
START, END = "<|startoftext|>", "<|endoftext|>"
FORMS = (
    "((((a))))",
    "[[a (b:2)]]",
    r"\(a\) \[b\] \\",
    "(a",
    "([)]",
    "(a:0) (b:0)",
    "(:1.3)",
    "() [] (( ))",
    "BREAK",
    "a BREAK BREAK (b:0.4) BREAK",
    "a " * 14 + "(b:0.5)",
    "! " * 20 + "(!:0.2) b",
    ". " * 20 + "(.:0.3), b",
    "a \U0001f642 (\U0001f642:0.4)",
    "\u05e9\u05dc\u05d5\u05dd (\u0639:1.3)",
    "a\nb\tc (d\n:0.2)",
    "a\x00b (\x07:0.5) (\u200b:0.5)",
    f"{END} a (b{END}:0.4) {START}",
    f"({END}:0.5)",
    "</s> a (</s>:0.5) <pad>",
    "x" * 30 + "(y:0.5)",
)


@pytest.fixture(scope="module", params=WRITERS)
def denoiser(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> DiffusersDenoiser:
    return load(WRITERS[request.param](tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> DiffusersDenoiser:
    return load(write_sd(tmp_path_factory.mktemp("sd")))


def encoded(denoiser: DiffusersDenoiser, prompt: str, **changes: Any) -> Conditioning:
    options: dict[str, Any] = {"negative_prompt": "fog", "guidance_scale": 5.0}
    options |= {"height": 64, "width": 64, "true_cfg_scale": 2.0, "prompt_weights": True}
    with torch.inference_mode():
        return denoiser.encode_texts([TextInput(prompt=prompt, **{**options, **changes})])[0]


def tokens(denoiser: DiffusersDenoiser, prompt: str, **changes: Any) -> Tensor:
    return encoded(denoiser, prompt, **changes).prompt.tensors["tokens"]


def test_no_form_of_a_prompt_fails(denoiser: DiffusersDenoiser) -> None:
    for form in FORMS:
        for texts in ({"prompt": form}, {"prompt": "a", "negative_prompt": form}):
            for is_weighted in (True, False):
                found = encoded(denoiser, prompt_weights=is_weighted, **texts)
                assert found.negative is not None
                for tensor in (*found.prompt.tensors.values(), *found.negative.tensors.values()):
                    assert torch.isfinite(tensor).all(), form


def test_weighted_words_remain_apart_in_the_pooled_embedding(tmp_path: Path) -> None:
    denoiser = load(write_sdxl(tmp_path))
    plain, weighted = (
        encoded(denoiser, prompt).prompt.tensors["pooled"]
        for prompt in ("red boat", "(red:1.3) (boat:1.5)")
    )
    assert torch.allclose(plain, weighted, atol=1e-5)


@pytest.mark.parametrize("special", [START, END])
def test_words_behind_many_start_or_end_tokens_are_read(
    sd: DiffusersDenoiser, special: str
) -> None:
    one, other = (tokens(sd, special * 20 + word) for word in ("red", "blue"))
    assert not torch.equal(one, other)


def test_the_words_that_are_not_read_are_named_after_a_line_break(sd: DiffusersDenoiser) -> None:
    prompt = "a\n" * 599 + "boat\nsea house"
    (warning,) = encoded(sd, prompt, guidance_scale=1.0).warnings
    assert "from 'sea house' on" in warning


def test_the_tokens_of_a_weighted_prompt_are_counted_by_its_parts() -> None:
    prompt = "(b:2)c" * 330  # one token each; without weights fewer
    assert validate(JobParams(prompt=prompt, prompt_weights=True), ValidationContext()) == []
    model = load(Path(str(files("img2img_server"))) / "models/atelier")
    found = encoded(model, prompt, guidance_scale=1.0)
    plain = encoded(model, "bc" * 330, guidance_scale=1.0)
    assert plain.warnings == ()
    (warning,) = found.warnings
    assert warning.startswith("The prompt was cut after 600 of 660 tokens")


def test_a_prompt_that_is_cut_and_has_too_many_chunks_has_both_warnings(
    sd: DiffusersDenoiser,
) -> None:
    (warning,) = encoded(sd, "a BREAK " * 601, guidance_scale=1.0).warnings
    assert "was cut after 600 of 601 tokens" in warning
    assert "chunks of the prompt" in warning


def test_only_the_chunks_that_are_read_are_encoded(
    sd: DiffusersDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: Any = sd._model.pipeline.text_encoder
    calls = 0
    forward = encoder.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(encoder, "forward", counted)
    encoded(sd, "b BREAK " * 250, guidance_scale=1.0)
    assert calls <= max_chunks(LENGTH)
