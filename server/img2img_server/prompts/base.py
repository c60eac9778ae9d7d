"""The seam to whatever rewrites prompts."""

from __future__ import annotations

import re
from typing import Protocol

MAX_CHARACTERS = 2000
_MANY_WORDS = 40
_MANY_PARTS = 4
# (red hat:1.3), <lora:name:0.8>. Neither part may run over a bracket, nor the first over a colon:
# with one way to match there is nothing to try again.
_WEIGHTS = re.compile(r"[(\[<][^()\[\]<>:]*:[^()\[\]<>]*[)\]>]")


class PromptRewriter(Protocol):
    """Rewrites prompts; deterministic: the same prompt and seed give the same text."""

    @property
    def warning(self) -> str:
        """What the job's `warning` says of a request for a rewritten prompt; mostly empty."""
        ...

    def rewrite(self, prompt: str, seed: int) -> str:
        """The text to use, 1 to 2000 characters; the prompt itself when it needs no help.

        May compute for seconds: not to be called on an event loop unless it is known to be quick.
        """
        ...


class AsSent:
    """Rewrites nothing, and says why."""

    def __init__(self, warning: str = "") -> None:
        self.warning = warning

    def rewrite(self, prompt: str, seed: int) -> str:
        return prompt


def is_elaborate(prompt: str) -> bool:
    """Whether its author has taken care already: long, a list of tags, or weighted words."""
    parts = [part for part in re.split(r"[,;|\n]", prompt) if part.strip()]
    return (
        len(prompt.split()) > _MANY_WORDS
        or len(parts) >= _MANY_PARTS
        or _WEIGHTS.search(prompt) is not None
    )
