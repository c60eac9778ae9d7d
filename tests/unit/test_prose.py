"""Pages, comments, texts, names and commit subjects use the words of the field; see tests/prose."""

from __future__ import annotations

import pytest

from tests import prose


def found(text: str, kind: str = "docstring") -> list[str]:
    """Returns what the check finds in a text."""
    return [each.found for each in prose.check(prose.Passage("file.py", 1, text, kind))]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("Saves the picture of whoever asks.", "docstring", ["picture", "whoever"]),
        ("The job goes on until the bus is back.", "comment", ["goes on", "the bus"]),
        ("What the job costs.", "docstring", ["What"]),
        ("The 28 keys of section 6.1.", "comment", ["section"]),
        ("A list of keys.", "function", ["A"]),
        ("Seconds until the next try.", "function", ["Seconds"]),
        ("told_pictures", "name", ["told", "pictures"]),
        ("lastPicture", "name", ["Picture"]),
    ],
)
def test_forbidden_words_and_forms_are_found(text: str, kind: str, words: list[str]) -> None:
    assert found(text, kind) == words


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Returns the image of the tenant that calls.", "function"),
        ("What does the job cost?", "docstring"),
        ("Messages go to the dead letters; `picture` is a name.", "comment"),
        ("A date as in RFC 9110, section 10.2.3.", "comment"),
        ("string", "name"),
        ("KeyRing", "name"),
    ],
)
def test_words_of_the_field_are_not_found(text: str, kind: str) -> None:
    assert found(text, kind) == []


def test_no_page_comment_text_or_name_has_a_forbidden_word_or_form() -> None:
    assert [str(each) for each in prose.findings()] == []


def test_every_commit_subject_is_a_short_imperative_sentence() -> None:
    subjects = prose.subjects()
    if subjects is None:
        pytest.skip(f"the history since {prose.FIRST_COMMIT} is not there")
    wrong = {subject: prose.check_subject(subject) for subject in subjects}
    assert {subject: why for subject, why in wrong.items() if why} == {}


@pytest.mark.parametrize(
    "subject",
    [
        "Rejects init images above 50 MP before decoding",
        "Added a page of terms",
        "Reject init images above 50 MP.",
        "reject init images above 50 MP",
        "Mend the bell",
        "Reject init images that have more pixels than the limit of the service allows them",
    ],
)
def test_a_subject_that_is_no_short_imperative_is_found(subject: str) -> None:
    assert prose.check_subject(subject) != []
