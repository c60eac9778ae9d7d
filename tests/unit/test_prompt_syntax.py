"""The syntax of weighted prompts."""

from __future__ import annotations

import pytest

from img2img_server.domain.params import JobParams, ValidationContext, validate
from img2img_server.domain.prompt_syntax import Fragment, parse, plain_text
from img2img_server.domain.violations import Reason


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a boat", [[("a boat", 1.0)]]),
        ("", [[]]),
        ("a (red:1.3) boat", [[("a ", 1.0), ("red", 1.3), (" boat", 1.0)]]),
        ("a (red) boat", [[("a ", 1.0), ("red", 1.1), (" boat", 1.0)]]),
        ("a [red] boat", [[("a ", 1.0), ("red", 1 / 1.1), (" boat", 1.0)]]),
        ("((Big Boat))", [[("Big Boat", 1.21)]]),
        ("(a (red:2) boat:0.5)", [[("a ", 0.5), ("red", 1.0), (" boat", 0.5)]]),
        ("(red:.5)(blue: 0 )", [[("red", 0.5), ("blue", 0.0)]]),
        ("(16:9) (x: y)", [[("16", 9.0), ("x: y", 1.1)]]),
        ("[red:0.5]", [[("red:0.5", 1 / 1.1)]]),
        (r"a \(red\) boat \\", [[("a (red) boat \\", 1.0)]]),
        ("a (red boat", [[("a (red boat", 1.0)]]),
        ("a :) boat ] (", [[("a :) boat ] (", 1.0)]]),
        ("() a", [[(" a", 1.0)]]),
        ("a BREAK b", [[("a ", 1.0)], [(" b", 1.0)]]),
        ("BREAK BREAK a", [[(" a", 1.0)]]),
        ("(a BREAK b:1.5)", [[("a ", 1.5)], [(" b", 1.5)]]),
        ("BREAKFAST Break", [[("BREAKFAST Break", 1.0)]]),
    ],
)
def test_a_prompt_has_the_fragments_that_its_syntax_says(
    prompt: str, expected: list[list[tuple[str, float]]]
) -> None:
    found = parse(prompt)
    assert [[text for text, _ in section] for section in found] == [
        [text for text, _ in section] for section in expected
    ]
    weights = [fragment.weight for section in found for fragment in section]
    assert weights == pytest.approx([weight for section in expected for _, weight in section])


def test_the_plain_text_has_no_syntax() -> None:
    assert plain_text(parse("a (red:1.3) boat BREAK[fog]")) == "a red boat  fog"


def test_the_longest_prompt_of_brackets_is_read_quickly() -> None:
    prompt = "(" * 1000 + ")" * 1000
    assert parse(prompt) == ((),)
    assert parse("(" * 2000) == ((Fragment("(" * 2000),),)
    (section,) = parse("(a" * 20_000 + ")" * 20_000)  # With quadratic work, it would take minutes.
    assert len(section) > 6000, "the weights above the largest float are equal"


def test_a_weight_above_ten_is_refused() -> None:
    params = JobParams(prompt="(a:10)", negative_prompt="((b:10))", prompt_weights=True)
    (found,) = validate(params, ValidationContext())
    assert (found.field, found.reason) == ("negative_prompt", Reason.OUT_OF_RANGE)
    assert found.message == "negative_prompt must not have weights above 10"
    plain = JobParams(prompt="(a:11)", negative_prompt="((b:10))")
    assert validate(plain, ValidationContext()) == []


def test_weights_without_a_number_are_refused() -> None:
    prompt = f"((a:0):{'9' * 400})"  # zero times infinity
    (found,) = validate(JobParams(prompt=prompt, prompt_weights=True), ValidationContext())
    assert (found.field, found.reason) == ("prompt", Reason.OUT_OF_RANGE)


def test_the_weights_of_a_prompt_that_is_too_long_are_not_read() -> None:
    prompt = "(a:11)" * 100_000
    (found,) = validate(JobParams(prompt=prompt, prompt_weights=True), ValidationContext())
    assert (found.field, found.reason) == ("prompt", Reason.TOO_LONG)
