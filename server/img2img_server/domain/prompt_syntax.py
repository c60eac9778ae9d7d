"""Reads weighted prompts: `(words:1.3)`, `(words)` for 1.1, `[words]` for 1/1.1, and BREAK, which
begins a new chunk. Brackets can be nested, their weights are multiplied; a backslash before a
bracket makes it a character of the text. A bracket without its partner is a character too, and a
weight that is no number is text; `ambiguous_syntax` names such brackets and weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

MAX_WEIGHT: Final = 10.0
# Fragments with a weight below 1: for each of them, the text encoders run once more.
MAX_REDUCED_WEIGHTS: Final = 32
_STRESS: Final = 1.1
_PARTS: Final = re.compile(r"\\[()\[\]\\]|[()\[\]]|\bBREAK\b|[^()\[\]\\B]+|.", re.DOTALL)
_WEIGHT: Final = re.compile(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")
# Texts that may be meant as weights: 1,3 or 1.3.1 or 130% or nan.
_MAYBE_WEIGHT: Final = re.compile(
    r":\s*([+-]?(?:[\d.,][^\s:]*|nan|inf|infinity))\s*$", re.IGNORECASE
)
_CLOSES: Final = {"(": ")", "[": "]"}
_MOST_NAMED: Final = 3
_MOST_CHARACTERS: Final = 20


class Fragment(NamedTuple):
    """A part of a prompt with one weight."""

    text: str
    weight: float = 1.0


Sections = tuple[tuple[Fragment, ...], ...]


class _Open(NamedTuple):
    """A bracket without its partner so far, and its place in the pieces."""

    bracket: str
    place: int


class _Pieces:
    """The pieces of a prompt, and the weights of its brackets by the places where they apply.

    Weights are multiplied once, at the end, so that the work is linear in the length of the prompt.
    """

    def __init__(self) -> None:
        self.no_numbers: list[str] = []  # texts in the place of weights
        self.unused: list[str] = []  # weights in square brackets
        self._texts: list[str | None] = []  # None: a BREAK
        self._begins: dict[int, float] = {}  # weight by the place of the bracket that it replaces
        self._ends: Counter[int] = Counter()  # number of weights that end before a place

    def add(self, text: str | None) -> int:
        """Adds a piece and returns its place."""
        self._texts.append(text)
        return len(self._texts) - 1

    def close(self, opened: _Open) -> None:
        """Gives the pieces behind a bracket its weight."""
        weight = _STRESS if opened.bracket == "(" else 1 / _STRESS
        last = self._texts[-1]
        if opened.bracket == "(" and last is not None and (found := _WEIGHT.search(last)):
            weight = float(found[1])
            self._texts[-1] = last[: found.start()]
        elif last is not None and (found := _MAYBE_WEIGHT.search(last)):
            (self.no_numbers if opened.bracket == "(" else self.unused).append(found[1])
        if opened.place == len(self._texts) - 1:  # The brackets are empty.
            self._texts.pop()
        else:
            self._begins[opened.place] = weight
            self._ends[len(self._texts)] += 1

    def __iter__(self) -> Iterator[tuple[str | None, float]]:
        """Yields each piece with its weight."""
        weights = [1.0]
        for place, text in enumerate(self._texts):
            for _ in range(self._ends[place]):
                weights.pop()
            if place in self._begins:
                weights.append(weights[-1] * self._begins[place])
            else:
                yield text, weights[-1]


def parse(prompt: str) -> Sections:
    """Returns the fragments of a weighted prompt, in sections that BREAK separates."""
    pieces, _ = _read(prompt)
    return tuple(section for section in _sections(pieces) if section) or ((),)


def ambiguous_syntax(prompt: str) -> Iterator[str]:
    """Yields a sentence for each kind of syntax that is read as text although it may be meant
    otherwise.
    """
    pieces, alone = _read(prompt)
    if alone:
        yield f"brackets without their partner are text: {' '.join(dict.fromkeys(alone))}"
    for kind, found in (
        ("weights that are no numbers such as 1.3", pieces.no_numbers),
        ("numbers in square brackets", pieces.unused),
    ):
        if found:
            texts = list(dict.fromkeys(text[:_MOST_CHARACTERS] for text in found))
            yield f"{kind} are text ({', '.join(texts[:_MOST_NAMED])})"


def without_breaks(sections: Sections) -> Sections:
    """Returns the sections as one, with a space in place of each BREAK."""
    joined = list(sections[0])
    for section in sections[1:]:
        first, *others = section
        joined += [first._replace(text=f" {first.text}"), *others]
    return (tuple(joined),)


def _read(prompt: str) -> tuple[_Pieces, list[str]]:
    """Returns the pieces of a prompt, and its brackets without a partner."""
    pieces = _Pieces()
    opened: list[_Open] = []
    alone: list[str] = []
    for part in _PARTS.findall(prompt):
        if part == "BREAK":
            pieces.add(None)
        elif part in _CLOSES:
            opened.append(_Open(part, pieces.add(part)))
        elif opened and part == _CLOSES[opened[-1].bracket]:
            pieces.close(opened.pop())
        else:
            is_escaped = len(part) == 2 and part[0] == "\\"
            pieces.add(part[1:] if is_escaped else part)
            if part in _CLOSES.values():
                alone.append(part)
    return pieces, [*(each.bracket for each in opened), *alone]


def plain_text(sections: Sections) -> str:
    """Returns the text of all fragments without the syntax."""
    return " ".join("".join(it.text for it in section) for section in sections)


def _sections(pieces: Iterable[tuple[str | None, float]]) -> Iterator[tuple[Fragment, ...]]:
    """Yields the fragments between two BREAKs. Neighbours of equal weight are joined, and blanks
    belong to the words before them, so that these remain apart from the next ones.
    """
    section: list[Fragment] = []
    for text, weight in [*pieces, (None, 1.0)]:
        if text is None:
            yield tuple(fragment for fragment in section if fragment.text.strip())
            section = []
        elif section and (section[-1].weight == weight or not text.strip()):
            last = section[-1]
            section[-1] = Fragment(last.text + text, last.weight)
        else:
            section.append(Fragment(text, weight))
