"""The Mermaid diagrams of the pages as SVG files: the site loads no script to draw them.

    python docs/site/diagrams.py        needs npm, Chromium and the network

draws the diagrams that have no file yet and deletes the files of diagrams that are gone. The name
of a file is the hash of its diagram's text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import posixpath
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

MERMAID = "mermaid@11.12.1"
OPTIONS = {
    "startOnLoad": False,
    "theme": "neutral",
    "htmlLabels": False,  # an image of SVG alone
    "flowchart": {"htmlLabels": False},
}
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/images/diagrams"
BLOCK = re.compile(r"^```mermaid\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.hooks.img2img")


def as_images(markdown: str, page: str) -> str:
    """Returns the page with its diagrams as links to their images, relative to the repository."""

    def image(match: re.Match[str]) -> str:
        target = path(match["text"])
        if not target.exists():
            log.warning("a diagram of %s has no image: run docs/site/diagrams.py", page)
        folder = posixpath.relpath("images/diagrams", posixpath.dirname(page) or ".")
        if page.startswith("repository/"):
            place = posixpath.dirname(page.removeprefix("repository/")) or "."
            folder = posixpath.relpath("docs/images/diagrams", place)
        return f"![Diagram]({folder}/{target.name})"

    return BLOCK.sub(image, markdown)


def path(text: str) -> Path:
    """Returns the file of a diagram."""
    return FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.svg"


def texts() -> list[str]:
    """Returns the diagrams of all pages."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    return [match["text"] for page in pages for match in BLOCK.finditer(page.read_text("utf-8"))]


def main() -> int:
    """Draws the missing images."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = {path(text): text for text in texts()}
    for old in set(FOLDER.glob("*.svg")) - wanted.keys():
        old.unlink()
    missing = {path: text for path, text in wanted.items() if not path.exists()}
    if missing:
        for target, image in draw(missing).items():
            target.write_text(image + "\n", encoding="utf-8")
    return 0


def draw(diagrams: dict[Path, str]) -> dict[Path, str]:
    """Returns the SVG of each diagram, drawn by Mermaid in Chromium."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", MERMAID], cwd=folder, check=True)
        [archive] = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extractall(folder, filter="data")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
            page = browser.new_page()
            page.set_content("<body></body>")
            page.add_script_tag(path=f"{folder}/package/dist/mermaid.min.js")
            page.evaluate("options => mermaid.initialize(options)", OPTIONS)
            drawn = {}
            for target, text in diagrams.items():
                call = f"mermaid.render('drawing', {json.dumps(text)}).then(drawn => drawn.svg)"
                drawn[target] = str(page.evaluate(call))
            browser.close()
    return drawn


if __name__ == "__main__":
    sys.exit(main())
