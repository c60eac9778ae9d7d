"""Names of models at a Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_ID: Final = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")
_FILE: Final = re.compile(r"\.(safetensors|ckpt|bin|pth?|gguf)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubId:
    """A model of the hub: owner/name, and a branch, tag or commit; empty for the main branch."""

    repo: str
    revision: str = ""

    @classmethod
    def parse(cls, source: str) -> HubId | None:
        """Returns the id in `owner/name` or `owner/name@revision`; None for anything else."""
        if source.startswith(("/", ".", "~")) or not _ID.fullmatch(source):
            return None
        repo, _, revision = source.partition("@")
        if _FILE.search(repo):  # the path of a file that does not exist
            return None
        return cls(repo, revision)

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo
