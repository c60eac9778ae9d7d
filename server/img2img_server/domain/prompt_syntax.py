"""Reads weighted prompts: `(words:1.3)`, `(words)` for 1.1, `[words]` for 1/1.1, and BREAK, which
begins a new chunk. Brackets can be nested, their weights are multiplied; a backslash before a
bracket makes it a character of the text. A bracket without its partner is one too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
    """A bracket without its partner so far, and the place of the first piece behind it."""

    bracket: str
    place: int


class _Piece(NamedTuple):
    """A piece of text; None: a BREAK."""

    text: str | None
    weight: float = 1.0


def parse(prompt: str) -> Sections:
    """Returns the fragments of a weighted prompt, in sections that BREAK separates."""
    pieces: list[_Piece] = []
    opened: list[_Open] = []
    for part in _PARTS.findall(prompt):
        if part == "BREAK":
            pieces.append(_Piece(None))
        elif part in _CLOSES:
            opened.append(_Open(part, len(pieces)))
            pieces.append(_Piece(part))
        elif opened and part == _CLOSES[opened[-1].bracket]:
            _close(pieces, opened.pop())
        else:
            is_escaped = len(part) == 2 and part[0] == "\\"
            pieces.append(_Piece(part[1:] if is_escaped else part))
    return tuple(section for section in _sections(pieces) if section) or ((),)


def plain_text(sections: Sections) -> str:
    """Returns the text of all fragments without the syntax."""
    return " ".join("".join(it.text for it in section) for section in sections)


def _close(pieces: list[_Piece], opened: _Open) -> None:
    """Removes the bracket at `opened` and multiplies the weights of the pieces behind it."""
    weight = _STRESS if opened.bracket == "(" else 1 / _STRESS
    last = pieces[-1]
    if opened.bracket == "(" and last.text is not None and (found := _WEIGHT.search(last.text)):
        weight = float(found[1])
        pieces[-1] = _Piece(last.text[: found.start()], last.weight)
    pieces[opened.place :] = [
        piece if piece.text is None else _Piece(piece.text, piece.weight * weight)
        for piece in pieces[opened.place + 1 :]
    ]


def _sections(pieces: list[_Piece]) -> Iterator[tuple[Fragment, ...]]:
    """Yields the fragments between two BREAKs. Neighbours of equal weight are joined."""
    section: list[Fragment] = []
    for text, weight in [*pieces, _Piece(None)]:
        if text is None:
            yield tuple(fragment for fragment in section if fragment.text.strip())
            section = []
        elif section and section[-1].weight == weight:
            section[-1] = Fragment(section[-1].text + text, weight)
        else:
            section.append(Fragment(text, weight))
