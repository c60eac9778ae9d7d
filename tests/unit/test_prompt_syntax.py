"""The syntax of weighted prompts."""

from __future__ import annotations

import pytest

from img2img_server.domain.params import JobParams, ValidationContext, validate
from img2img_server.domain.prompt_syntax import (
    Fragment,
    ambiguous_syntax,
    parse,
    plain_text,
    without_breaks,
)
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
        ("(16:9) (x: y)", [[("16 ", 9.0), ("x: y", 1.1)]]),
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


def test_weighted_words_remain_apart_in_the_plain_text() -> None:
    assert plain_text(parse("(red:1.3) (boat:0.5)\n[sea]")) == "red boat\nsea"
    assert plain_text(parse("(re:1.3)(d:0.5)")) == "red"


def test_sections_are_joined_with_a_space_in_place_of_each_break() -> None:
    (found,) = without_breaks(parse("a (red:1.3)BREAK(boat:1.3) BREAK sea"))
    assert "".join(text for text, _ in found) == "a red boat   sea"
    assert [weight for _, weight in found] == [1.0, 1.3, 1.3, 1.0]
    assert without_breaks(parse("")) == ((),)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a (red:1.3) [boat] (at: night) (16:9)", []),
        (r"a \(red\) boat", []),
        ("a (red:1.3", ["brackets without their partner are text: ("]),
        ("a :) boat ([b)", ["brackets without their partner are text: ( [ )"]),
        ("(a:1,3)", ["weights that are no numbers such as 1.3 are text (1,3)"]),
        (
            "(a:nan) (b:-Inf) (a:1.3.1) (c:1e3)",
            ["weights that are no numbers such as 1.3 are text (nan, -Inf, 1.3.1)"],
        ),
        ("(a:130%)", ["weights that are no numbers such as 1.3 are text (130%)"]),
        ("[red:blue:0.5]", ["numbers in square brackets are text (0.5)"]),
        ("(a:nan", ["brackets without their partner are text: ("]),
    ],
)
def test_syntax_that_is_read_as_text_is_named(prompt: str, expected: list[str]) -> None:
    assert list(ambiguous_syntax(prompt)) == expected


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


@pytest.mark.parametrize("prompt", ["(a:-1)", "((a:2):-0.5)", "b (a: -.5 )"])
def test_a_negative_weight_is_refused(prompt: str) -> None:
    params = JobParams(prompt="a", negative_prompt=prompt, prompt_weights=True)
    (found,) = validate(params, ValidationContext())
    assert (found.field, found.reason) == ("negative_prompt", Reason.OUT_OF_RANGE)
    assert "below 0" in found.message
    assert validate(JobParams(prompt=prompt), ValidationContext()) == []


def test_a_prompt_with_more_than_32_parts_of_a_weight_below_1_is_refused() -> None:
    parts = [f"(a:0.{5 + number % 2})" for number in range(33)]
    context = ValidationContext()
    (found,) = validate(JobParams(prompt="".join(parts), prompt_weights=True), context)
    assert (found.field, found.reason) == ("prompt", Reason.TOO_MANY)
    assert validate(JobParams(prompt="".join(parts[:32]), prompt_weights=True), context) == []
    strong = "".join(parts).replace("0.", "1.")
    assert validate(JobParams(prompt=strong, prompt_weights=True), context) == []


def test_weights_without_a_number_are_refused() -> None:
    prompt = f"((a:0):{'9' * 400})"  # zero times infinity
    (found,) = validate(JobParams(prompt=prompt, prompt_weights=True), ValidationContext())
    assert (found.field, found.reason) == ("prompt", Reason.OUT_OF_RANGE)


def test_the_weights_of_a_prompt_that_is_too_long_are_not_read() -> None:
    prompt = "(a:11)" * 100_000
    (found,) = validate(JobParams(prompt=prompt, prompt_weights=True), ValidationContext())
    assert (found.field, found.reason) == ("prompt", Reason.TOO_LONG)
