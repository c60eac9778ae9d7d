"""Files that only the owner of the process may read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

PRIVATE: Final = 0o077  # the umask of files that only their owner may read


def write_private(path: Path, text: str) -> None:
    """Writes the file with mode 600, as a whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def kept_secret(path: Path) -> str:
    """Returns a random secret, which the first call creates and stores."""
    if not path.exists():
        write_private(path, secrets.token_urlsafe(30))
    return path.read_text()
