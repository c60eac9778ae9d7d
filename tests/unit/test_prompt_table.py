"""The table of the page about models says what each family does with a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
from diffusers.loaders import TextualInversionLoaderMixin

from img2img_server.engine.diffusers.families import families
from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.diffusers.windows import MAX_TOKENS

PAGE = Path(__file__).parents[2] / "docs/models.md"
HEAD = (
    "| family | weights | `BREAK` | tokens of a prompt | `clip_skip` | embeddings |"
    " negative prompt |"
)


class Tokenizer:
    """A tokenizer without a limit, for which other texts than prompts have no tokens."""

    model_max_length = 10**30

    def __call__(self, text: str, **_: Any) -> Mapping[str, list[int]]:
        return {"input_ids": []}

    def num_special_tokens_to_add(self) -> int:
        return 0

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        return "\0"


class Pipeline(SimpleNamespace):
    """A pipeline that has every part."""

    def __getattr__(self, name: str) -> object:
        return object()


def files_of(family: Family) -> Any:
    """Returns the files of a model with text encoders of twelve layers."""
    text = {"num_hidden_layers": 12}
    # Every model of this family takes the guidance scale as an input.
    denoiser = {"time_cond_proj_dim": 256} if family.name == "lcm" else {}
    return SimpleNamespace(
        index={},
        scheduler={},
        known_names=(),
        name="m",
        parts={"text_encoder": ("", ""), "text_encoder_2": ("", "")},
        absent_parts=frozenset(),
        config=lambda part: text if part.startswith("text") else denoiser,
    )


def row_of(family: Family) -> str:
    traits = family.traits(files_of(family))
    has_chunks = bool(family.clip_encoders(SimpleNamespace(pipeline=Pipeline())))  # type: ignore[arg-type]
    weights = ("on CLIP" if has_chunks else "on T5") if traits.takes_prompt_weights else "no"
    breaks = {"on CLIP": "a new chunk", "on T5": "a space", "no": "text"}[weights]
    limit = family.token_limit(Tokenizer())
    tokens = "those of the tokenizer" if limit == Tokenizer.model_max_length else str(limit)
    if has_chunks:
        tokens = f"{MAX_TOKENS} in chunks"
    pipeline = getattr(diffusers, next(iter(family.pipelines.values())))
    is_offered = has_chunks and issubclass(pipeline, TextualInversionLoaderMixin)
    negative = "no"
    if traits.takes_negative_prompt:
        is_usual = traits.guidance.is_classifier_free
        negative = "with guidance" if is_usual else "with `true_cfg_scale`"
    cells = (
        family.name,
        weights,
        breaks,
        tokens,
        "yes" if traits.max_clip_skip else "no",
        "yes" if is_offered else "no",
        negative,
    )
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_the_page_about_models_says_what_a_family_does_with_prompts(family: Family) -> None:
    assert row_of(family) in table()


def test_the_table_has_no_other_rows() -> None:
    assert len(table()) == len(families())


def table() -> list[str]:
    _, _, text = PAGE.read_text(encoding="utf-8").partition(f"{HEAD}\n")
    rows, _, _ = text.partition("\n\n")
    return rows.splitlines()[1:]
