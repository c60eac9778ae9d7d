"""Reads the fenced blocks of our Markdown pages, so that tests can run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# ```python
# text
# ```
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language ("" if it has none) and the text between the fences."""

    language: str
    text: str


def pages() -> list[Path]:
    """Returns every Markdown page of the repository that is for readers."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


def blocks(page: Path, language: str) -> list[Block]:
    """Returns the page's blocks of one language, in order."""
    return [block for block in fences(page) if block.language == language]


def fences(page: Path) -> list[Block]:
    """Returns all fenced blocks of the page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(match["language"], match["text"]) for match in FENCE.finditer(text)]


def make_words(page: Path) -> set[str]:
    """Returns every target in `make TARGET` on the page, in its text or in an `sh` block."""
    words = set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")))
    for block in blocks(page, "sh"):
        for line in re.findall(r"^(?:.* )?make ((?:[a-z-]+ ?)+)", block.text, re.MULTILINE):
            words |= set(line.split())
    return words
