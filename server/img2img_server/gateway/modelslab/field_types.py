"""How the HTTP contract reads a JSON value: its kinds of field and their coercions (section 4).

Callers of the hosted API send numbers and booleans as strings; both spellings are ordinary input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,400}(\.0{0,400})?\s*", re.ASCII)
# One way to match each text, so that a long one that does not match is given up at once.
_DECIMAL = re.compile(
    r"\s*[+-]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,400})?\s*", re.ASCII
)
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of field.

    `read` returns the coerced value or raises ValueError; `expected` ends the sentence "it must
    be …" that the caller then gets; `schemas` are the JSON Schemas of every spelling that is
    accepted, the preferred one first.
    """

    read: Callable[[Any], Any]
    expected: str
    schemas: tuple[dict[str, Any], ...]


def read_string(value: Any) -> str:
    """JSON strings only, and only those that are Unicode text (no lone surrogates)."""
    if not isinstance(value, str):
        raise ValueError("not a string")
    if not value.isascii():
        value.encode()
    return value


def read_integer(value: Any) -> int:
    """512, 512.0 and " 512 "; no booleans."""
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value.partition(".")[0])
    if isinstance(value, float) and value.is_integer():  # infinities and NaN are not
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("not an integer")


def read_number(value: Any) -> float:
    """0.7, 1 and "0.7"; no booleans, NaN or infinities."""
    if isinstance(value, str) and not _DECIMAL.fullmatch(value):
        raise ValueError("not a number")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("not a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError("not a number") from error
    if not math.isfinite(number):
        raise ValueError("not a number")
    return number


def read_boolean(value: Any) -> bool:
    """true, false, 1, 0 and, in any case, "true", "false", "yes", "no", "1", "0"."""
    if isinstance(value, str):
        word = _WORDS.get(value.strip().lower())
        if word is not None:
            return word
    elif isinstance(value, bool | int) and value in (0, 1):
        return bool(value)
    raise ValueError("not a boolean")


def read_reference(value: Any) -> str | int:
    """A string or an integer, which keep their type."""
    return read_string(value) if isinstance(value, str) else read_integer(value)


STRING = Kind(read_string, "a string", ({"type": "string"},))
INTEGER = Kind(
    read_integer,
    "an integer",
    ({"type": "integer"}, {"type": "string", "pattern": r"^\s*[+-]?[0-9]{1,400}\s*$"}),
)
NUMBER = Kind(
    read_number,
    "a number",
    (
        {"type": "number"},
        {"type": "string", "pattern": r"^\s*[+-]?[0-9]{1,400}(\.[0-9]{1,400})?\s*$"},
    ),
)
BOOLEAN = Kind(
    read_boolean,
    "true or false",
    (
        {"type": "boolean"},
        {"type": "integer", "enum": [0, 1]},
        {"type": "string", "enum": ["true", "false", "yes", "no", "1", "0"]},
    ),
)
REFERENCE = Kind(
    read_reference, "a string or an integer", ({"type": "string"}, {"type": "integer"})
)
