"""The tokenizer of CLIP, whose vocabulary ships with the package (models/clip_tokenizer)."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Final

from transformers import CLIPTokenizer

_LENGTH: Final = 77  # the longest prompt of all published CLIP encoders, in tokens
_START: Final = "<|startoftext|>"
_END: Final = "<|endoftext|>"


def clip_tokenizer(pad_token: str = "") -> Any:
    """Returns CLIP's tokenizer.

    Args:
        pad_token: The token that fills short prompts; empty: the one that ends prompts.
    """
    folder = Path(str(resources.files("img2img_server"))) / "models" / "clip_tokenizer"
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [first + second for first, second in merges]
    vocab = {token: number for number, token in enumerate([*tokens, _START, _END])}
    pairs: Any = merges  # The annotation of the library names texts only.
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=pairs,
        bos_token=_START,
        eos_token=_END,
        unk_token=_END,
        pad_token=pad_token or _END,
    )
    tokenizer.model_max_length = _LENGTH
    return tokenizer


def _byte_letters() -> list[str]:
    """Returns the character for each byte, in the order of the vocabulary. A printable byte has the
    character with its own code, any other byte one of the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = len(set(range(256)) - set(printable))
    return [chr(number) for number in (*printable, *range(256, 256 + others))]
