"""What enhance_prompt does to a prompt: by rules, by a language model, or nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img_server.prompts.base import AsSent, PromptRewriter, is_elaborate
from img2img_server.prompts.choose import NO_REWRITER, api_rewriter, worker_rewriter
from img2img_server.prompts.language_model import LanguageModelRewriter
from img2img_server.prompts.rules import RuleRewriter
from img2img_server.settings import Settings, SettingsError

SEEDS = range(40)
RULES = RuleRewriter()
WORDS = ("a", "the", "cat", "harbour", "at", "dusk", "warm", "light", "wide", "soft", "view")
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
    """Everything that any seed adds to the prompt."""
    return " / ".join(RULES.rewrite(prompt, seed).removeprefix(prompt) for seed in SEEDS)


def test_a_short_prompt_gets_medium_light_composition_and_quality() -> None:
    assert RULES.rewrite("a harbour", 1) == (
        "a harbour, oil painting, soft natural light, wide view, visible brushwork, fine detail"
    )


def test_the_seed_chooses_and_the_same_seed_chooses_the_same() -> None:
    texts = [RULES.rewrite("a harbour", seed) for seed in SEEDS]
    assert texts == [RULES.rewrite("a harbour", seed) for seed in SEEDS]
    assert len(set(texts)) > 5


@pytest.mark.parametrize("prompt", [*ELABORATE, "", "   "])
def test_elaborate_and_empty_prompts_stay_as_they_are(prompt: str) -> None:
    assert {RULES.rewrite(prompt, seed) for seed in SEEDS} == {prompt}


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
    RULES.rewrite(prompt, 1)
    assert time.process_time() - started < 1  # some milliseconds; by trial and error, seconds


def test_a_text_that_would_become_too_long_stays_as_it_is() -> None:
    prompt = "a" * 1990
    assert RULES.rewrite(prompt, 1) == prompt


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
    told = added(prompt)
    assert [term for term in never if term in told] == []


@given(st.text(max_size=2000), st.integers(0, 2**32 - 1))
def test_a_rewritten_prompt_begins_with_the_prompt_and_keeps_the_limit(
    prompt: str, seed: int
) -> None:
    text = RULES.rewrite(prompt, seed)
    assert text == prompt or text.startswith(prompt.rstrip(" \t\r\n.,;"))
    assert len(text) <= 2000


def test_each_setting_names_its_rewriter() -> None:
    assert isinstance(api_rewriter(Settings()), RuleRewriter)
    off = api_rewriter(Settings(prompt_rewriter="off"))
    assert (off.rewrite("a cat", 1), off.warning) == ("a cat", NO_REWRITER)
    by_model = Settings(prompt_rewriter="model", prompt_model="models/writer")
    left = api_rewriter(by_model)  # to the worker
    assert (left.rewrite("a cat", 1), left.warning) == ("a cat", "")
    for settings in (Settings(), Settings(prompt_rewriter="off")):
        assert isinstance(worker_rewriter(settings), AsSent)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_rewriter": "model"},
        {"prompt_model": "models/writer"},
        {"prompt_template": "Make it better."},
        {"prompt_rewriter": "magic"},
    ],
)
def test_settings_that_do_not_fit_together_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        Settings.load(**wrong)


def test_a_model_that_is_not_there_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    config = Settings(prompt_rewriter="model", prompt_model=str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="IMG2IMG_PROMPT_MODEL"):
        worker_rewriter(config)


def write_tokenizer(folder: Path) -> int:
    """A tokenizer of whole words; returns how many it knows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return len(words)


def write_model(folder: Path, kind: str) -> Path:
    """A tiny model with random weights: its words mean nothing, its path is the real one."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    size = write_tokenizer(folder)
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": 1}
    if kind == "causal":
        config = GPT2Config(
            vocab_size=size,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=128,
            bos_token_id=1,
            **special,
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        config = T5Config(
            vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0, **special,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["causal", "text-to-text"])
def by_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, PromptRewriter]:
    folder = write_model(tmp_path_factory.mktemp("model"), request.param)
    config = Settings(prompt_rewriter="model", prompt_model=str(folder))
    return request.param, worker_rewriter(config)


def test_a_language_model_writes_by_the_seed(by_model: tuple[str, PromptRewriter]) -> None:
    kind, rewriter = by_model
    assert isinstance(rewriter, LanguageModelRewriter)
    texts = [rewriter.rewrite("a cat", seed) for seed in range(6)]
    assert texts == [rewriter.rewrite("a cat", seed) for seed in range(6)]
    assert len(set(texts)) > 1
    assert {word for text in texts for word in text.split()} <= set(WORDS)
    assert all(text.startswith("a cat ") for text in texts) or kind == "text-to-text"


def test_a_language_model_leaves_elaborate_prompts_alone(
    by_model: tuple[str, PromptRewriter],
) -> None:
    for prompt in ELABORATE:
        assert by_model[1].rewrite(prompt, 1) == prompt


def test_a_language_model_touches_no_random_numbers_of_others(
    by_model: tuple[str, PromptRewriter],
) -> None:
    import torch

    before = torch.get_rng_state()
    by_model[1].rewrite("a cat", 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_template_is_what_the_model_is_asked(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path, "text-to-text"))
    plain = LanguageModelRewriter(folder)
    asked = LanguageModelRewriter(folder, "the warm view {prompt}")
    assert asked.rewrite("a cat", 1) == plain.rewrite("the warm view a cat", 1)
    assert asked.rewrite("a cat", 1) != plain.rewrite("a cat", 1)
