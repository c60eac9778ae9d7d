"""The terms that the rules add to a prompt."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img_server.prompts import is_elaborate, rewrite

SEEDS = range(40)
ELABORATE = [
    "a cat, oil painting, masterpiece, 4k",
    " ".join(["word"] * 41),
    "a (red hat:1.3) on a table",
    "a cat <lora:ink:0.8>",
    "a ((red hat:1.3) [small]) cat",
    "a (big [red:1.2] hat",
    "cat | dog | bird | fish",
]


def added(prompt: str) -> str:
    """Returns all terms that any seed adds to the prompt."""
    return " / ".join(rewrite(prompt, seed).removeprefix(prompt) for seed in SEEDS)


def test_a_short_prompt_gets_medium_light_composition_and_quality() -> None:
    assert rewrite("a harbour", 1) == (
        "a harbour, oil painting, soft natural light, wide view, visible brushwork, fine detail"
    )


def test_the_seed_chooses_and_the_same_seed_chooses_the_same() -> None:
    texts = [rewrite("a harbour", seed) for seed in SEEDS]
    assert texts == [rewrite("a harbour", seed) for seed in SEEDS]
    assert len(set(texts)) > 5


@pytest.mark.parametrize("prompt", [*ELABORATE, "", "   "])
def test_elaborate_and_empty_prompts_stay_as_they_are(prompt: str) -> None:
    assert {rewrite(prompt, seed) for seed in SEEDS} == {prompt}


def test_forty_words_and_three_parts_are_not_elaborate() -> None:
    assert not is_elaborate(" ".join(["word"] * 40))
    assert not is_elaborate("a cat, a dog, a bird")
    assert not is_elaborate("the train at 10:30 (late)")


@pytest.mark.parametrize(
    "piece", ["(:", "(", ":", "(a:b", "[<(", "(:a:", "a", "a-", "(]:", "ray "], ids=repr
)
def test_the_longest_prompt_is_read_in_no_time(piece: str) -> None:
    prompt = (piece * 2000)[:2000]
    started = time.process_time()
    rewrite(prompt, 1)
    # The check takes some milliseconds. With backtracking it would take seconds.
    assert time.process_time() - started < 1


def test_a_text_that_would_become_too_long_stays_as_it_is() -> None:
    prompt = "a" * 1990
    assert rewrite(prompt, 1) == prompt


@pytest.mark.parametrize(
    ("prompt", "never"),
    [
        ("an oil painting of a harbour", ["photograph", "focus", "digital painting"]),
        ("a harbour, pencil sketch", ["photograph", "painting", "light", "brushwork"]),
        ("pixel art of a castle", ["photograph", "painting", "light", "view", "focus"]),
        ("a photo of a cat", ["painting", "brushwork", "photograph"]),
        ("a street at night", ["sun", "golden", "daylight", "natural light"]),
        ("a monochrome harbour at dusk", ["warm", "golden", "vivid", "colour"]),
        ("a blurry harbour", ["sharp", "crisp", "detail"]),
        ("a harbour in the style of Hokusai", ["photograph", "painting"]),
        ("a candle lit face", ["light", "sun"]),
        ("a wide view of a valley", ["centre", "head and shoulders", "wide view"]),
        ("3D render of a chair", ["photograph", "painting", "brushwork"]),
    ],
)
def test_nothing_is_added_that_contradicts_or_repeats_the_prompt(
    prompt: str, never: list[str]
) -> None:
    reported = added(prompt)
    assert [term for term in never if term in reported] == []


@given(st.text(max_size=2000), st.integers(0, 2**32 - 1))
def test_a_rewritten_prompt_begins_with_the_prompt_and_keeps_the_limit(
    prompt: str, seed: int
) -> None:
    text = rewrite(prompt, seed)
    assert text == prompt or text.startswith(prompt.rstrip(" \t\r\n.,;"))
    assert len(text) <= 2000
