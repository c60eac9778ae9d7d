"""Reads the fenced blocks of our Markdown pages, so that tests can run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# ```python
# text
# ```
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: its language and title ("" if it has none), the text between the fences and
    the number of its first line.
    """

    language: str
    text: str
    title: str = ""
    line: int = 0


def pages() -> list[Path]:
    """Returns every Markdown page of the repository that is for readers."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])


def blocks(page: Path, language: str) -> list[Block]:
    """Returns the page's blocks of one language, in order."""
    return [block for block in fences(page) if block.language == language]


def fences(page: Path) -> list[Block]:
    """Returns all fenced blocks of the page, in order."""
    page_text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(page_text):
        text = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        line = page_text[: match.start()].count("\n") + 1
        found.append(Block(match["language"], text, match["title"] or "", line))
    return found


def titled(page: Path, title: str) -> Block:
    """Returns the only block of the page with this title."""
    [block] = [block for block in fences(page) if block.title == title]
    return block


def make_words(page: Path) -> set[str]:
    """Returns every target in `make TARGET` on the page, in its text or in an `sh` block."""
    words = set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")))
    for block in blocks(page, "sh"):
        for line in re.findall(r"^(?:.* )?make ((?:[a-z-]+ ?)+)", block.text, re.MULTILINE):
            words |= set(line.split())
    return words
