"""The rules that a request broke: each with a reason that programs can branch on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Final

SHOWN_CHARACTERS: Final = 80  # longest name, which the caller sent, in a message


class Reason(StrEnum):
    """Why a field was rejected; sent as google.rpc.BadRequest.FieldViolation.reason."""

    REQUIRED = "REQUIRED"
    INVALID_TYPE = "INVALID_TYPE"
    UNKNOWN_FIELD = "UNKNOWN_FIELD"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    NOT_DIVISIBLE = "NOT_DIVISIBLE"
    TOO_LONG = "TOO_LONG"
    TOO_MANY = "TOO_MANY"
    NOT_SUPPORTED = "NOT_SUPPORTED"
    INVALID_FORMAT = "INVALID_FORMAT"
    INVALID_URL = "INVALID_URL"
    INVALID_IMAGE = "INVALID_IMAGE"
    TOO_MANY_BYTES = "TOO_MANY_BYTES"
    TOO_MANY_PIXELS = "TOO_MANY_PIXELS"
    DOWNLOAD_FAILED = "DOWNLOAD_FAILED"
    FORBIDDEN_ADDRESS = "FORBIDDEN_ADDRESS"
    UNREACHABLE = "UNREACHABLE"
    STORE_REFUSED = "STORE_REFUSED"


@dataclasses.dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule.

    Attributes:
        field: Name of the field in the request.
        reason: A Reason, or the text of a reason that another version has sent.
        message: A plain sentence that is complete by itself.
        cause: The exact fault as a clause, if the message does not name it.
        values: Every number and name of the message that a caller may want to show differently.
    """

    field: str
    reason: str
    message: str
    cause: str = ""
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def text(self) -> str:
        """Returns the message with the cause."""
        return f"{self.message}: {self.cause}" if self.cause else self.message


def required(name: str, cause: str = "") -> Violation:
    """Returns the violation of a field that is missing, or is as good as missing by the cause."""
    return Violation(name, Reason.REQUIRED, f"{name} is required", cause)


def invalid_type(name: str, expected: str) -> Violation:
    """Returns the violation of a value of another type; `expected`: for example "an integer"."""
    message = f"{name} must be {expected}"
    return Violation(name, Reason.INVALID_TYPE, message, values={"expected": expected})


def out_of_range(name: str, least: float, most: float) -> Violation:
    """Returns the violation of a number outside its bounds."""
    low, high = _number(least), _number(most)
    message = f"{name} must be between {low} and {high}"
    return Violation(name, Reason.OUT_OF_RANGE, message, values={"min": low, "max": high})


def too_long(name: str, most: int) -> Violation:
    """Returns the violation of a text with more than `most` characters."""
    message = f"{name} must not be longer than {most} characters"
    return Violation(name, Reason.TOO_LONG, message, values={"max": str(most)})


def not_supported(name: str, known: Iterable[str]) -> Violation:
    """Returns the violation for a name that is not one of the supported names."""
    message = f"{name} must be one of {', '.join(known)}"
    return Violation(name, Reason.NOT_SUPPORTED, message)


def invalid_url(name: str, cause: str = "") -> Violation:
    """Returns the violation for a text that is no URL, or a URL that may not be used here."""
    return Violation(name, Reason.INVALID_URL, f"{name} must be a valid URL", cause)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
