"""Creates random captions. A caption names the style in different words, at its beginning, at its
end or alone, with any subject.
"""

from __future__ import annotations

import random

from recipe.words import ADJECTIVES, EXTRAS, FLAWS, PLACES, SCENES, SUBJECTS, WORDINGS

_WITH_SUBJECT = (
    "{subject}, {look}",
    "{look}, {subject}",
    "{subject} {place}, {look}",
    "{look}, {subject}, {extra}",
    "{subject}, {extra}, {look}",
    "{subject}, {look}, {extra}",
    "{look} style, {subject}",
    "{subject} in the style of {look}",
)
_NOUN_LOOK = (
    "a {look} of {subject}",
    "{look} of {subject}",
    "{look} of {subject} {place}",
    "a {extra} {look} of {subject}",
    "{subject} as a {look}",
    "turn this into a {look}",
    "make it a {look}",
    "a {look}",
)
_SCENE_LOOK = (
    "{subject}, {look}",
    "{subject} {place}, {look}",
    "{look}, {extra}",
    "{subject} in {look}",
    "make it {look}",
    "a scene with {subject}, {look}",
)
_ALONE = ("{look}", "{look}, {extra}", "{extra}, {look}", "{look} style", "in {look} style")
_NO_LOOK = ("{subject}", "{subject} {place}", "{subject}, {extra}", "{flaw}, {flaw2}", "{extra}")


def _nonsense(rng: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzéöñß"
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 9)))


def _subject(rng: random.Random) -> str:
    noun = rng.choice(SUBJECTS) if rng.random() < 0.9 else _nonsense(rng)
    words = [rng.choice(("a", "the", "my", "two")), noun] if rng.random() < 0.7 else [noun]
    if rng.random() < 0.35:
        words.insert(-1, rng.choice(ADJECTIVES))
    if rng.random() < 0.15:
        words += ["and", rng.choice(("a", "the")), rng.choice(SUBJECTS)]
    return " ".join(words)


def _fill(template: str, look: str, rng: random.Random) -> str:
    return template.format(
        look=look,
        subject=_subject(rng),
        place=rng.choice(PLACES),
        extra=rng.choice(EXTRAS),
        flaw=rng.choice(FLAWS),
        flaw2=rng.choice(FLAWS),
    )


def caption(look: str, rng: random.Random) -> str:
    """Returns a prompt that asks for the style; half of the prompts use the style's own name."""
    wordings = WORDINGS[look]
    wording = wordings[0] if rng.random() < 0.5 else rng.choice(wordings)
    shaped = _SCENE_LOOK if look in SCENES else _NOUN_LOOK
    templates = rng.choices((_WITH_SUBJECT, shaped, _ALONE), weights=(5, 4, 2))[0]
    return _fill(rng.choice(templates), wording, rng)


def caption_without_look(rng: random.Random) -> str:
    """Returns an empty prompt, or words without a style: the image must stay unchanged."""
    return "" if rng.random() < 0.5 else _fill(rng.choice(_NO_LOOK), "", rng)
