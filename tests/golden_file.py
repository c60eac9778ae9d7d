"""Golden files in tests/golden: outputs that must not change by accident; tests compare with them.

`make gold` runs the tests whose names contain "golden" with GOLD=1, which rewrites the files.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "golden"


def assert_golden(name: str, text: str) -> None:
    """Compares `text` with the file tests/golden/`name`; with GOLD=1 writes it there instead."""
    path = FOLDER / name
    if os.environ.get("GOLD") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    assert path.exists(), f"tests/golden/{name} is missing: run `make gold`"
    assert text == path.read_text(encoding="utf-8"), f"tests/golden/{name} differs: `make gold`?"
