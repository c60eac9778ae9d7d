"""Reads weighted prompts: `(words:1.3)`, `(words)` for 1.1, `[words]` for 1/1.1, and BREAK, which
begins a new chunk. Brackets can be nested, their weights are multiplied; a backslash before a
bracket makes it a character of the text. A bracket without its partner is one too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

MAX_WEIGHT: Final = 10.0
_STRESS: Final = 1.1
_PARTS: Final = re.compile(r"\\[()\[\]\\]|[()\[\]]|\bBREAK\b|[^()\[\]\\B]+|.", re.DOTALL)
_WEIGHT: Final = re.compile(r":\s*(\d+(?:\.\d*)?|\.\d+)\s*$")
_CLOSES: Final = {"(": ")", "[": "]"}


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
    pieces = _Pieces()
    opened: list[_Open] = []
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
    return tuple(section for section in _sections(pieces) if section) or ((),)


def plain_text(sections: Sections) -> str:
    """Returns the text of all fragments without the syntax."""
    return " ".join("".join(it.text for it in section) for section in sections)


def _sections(pieces: Iterable[tuple[str | None, float]]) -> Iterator[tuple[Fragment, ...]]:
    """Yields the fragments between two BREAKs. Neighbours of equal weight are joined."""
    section: list[Fragment] = []
    for text, weight in [*pieces, (None, 1.0)]:
        if text is None:
            yield tuple(fragment for fragment in section if fragment.text.strip())
            section = []
        elif section and section[-1].weight == weight:
            section[-1] = Fragment(section[-1].text + text, weight)
        else:
            section.append(Fragment(text, weight))
