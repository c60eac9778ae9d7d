"""Keeps what callers sent out of the log records of libraries, and bounds their number.

Libraries log what they cannot read: gRPC logs whole header values that are not UTF-8, HTTP servers
log the line of a header. So bytes, credentials and long texts are masked in their records. Records
of the model libraries on which an operator cannot act are dropped by their text.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict
from collections.abc import MutableMapping
from typing import Any, Final

OWN_LOGGERS: Final = "img2img_server"
MOST_CHARACTERS: Final = 4000  # of a message or a traceback
_PERIOD_SECONDS: Final = 10.0
_MOST_OF_A_PERIOD: Final = 10  # records of one place in a library
_MOST_PLACES: Final = 200
_MASKS: Final = (
    # The text of a bytes object, also one that was cut.
    (re.compile(r"""\bb'(?:[^'\\]|\\.)*(?:'|$)|\bb"(?:[^"\\]|\\.)*(?:"|$)""", re.DOTALL), "b'...'"),
    (re.compile(r"(?i)\b(bearer|basic|token)\s+[^\s'\",]+"), r"\1 ..."),
    (re.compile(r"\b(i2[it]_)[^\s'\",]+"), r"\1..."),
    (
        re.compile(
            r"""(?i)(\b(?:authorization|x-api-key|key|password|secret)['"]?\s*[:=]\s*['"]?)"""
            r"""[^\s'",&]+"""
        ),
        r"\1...",
    ),
)

# Records on which an operator cannot act: the beginning of the logger's name, and the text.
_NOT_ACTIONABLE: Final = tuple(
    (library, re.compile(text))
    for library, text in (
        # The service uses the classes that need only Pillow, or none of them.
        ("transformers", r"`\w+ImageProcessor` requires torchvision \(not installed\)"),
        # The engine reads long prompts in chunks, and Job.warning names the words that are cut.
        ("transformers", r"Token indices sequence length is longer than "),
        ("diffusers", r"The following part of your input was truncated because "),
        # Configurations leave out tokens that the encoder does not use.
        ("transformers", r"Model config: \w+_token_id must be "),
        # The engine checks which class a part has, and which parts fit together.
        ("diffusers", r"Expected types for \w+: "),
        ("diffusers", r"You have passed a non-standard module "),
        # It names no module.
        ("diffusers", r"There are modules in \w+ that should be kept in float32: \[\]"),
        # The single-step sampler of DPM++ corrects its own configuration.
        ("diffusers", r" ?(`last_sigmas_type='zero'` is|Changing scheduler).*lower_order_final"),
        # diffusers writes this entry itself.
        ("diffusers", r"The config attributes \{'block_out_channels'.* passed to AutoencoderTiny,"),
        # The libraries use their own deprecated names.
        ("transformers", r"`use_return_dict` is deprecated"),
        ("py.warnings", r"(?s).*FutureWarning: `FluxPosEmbed` is deprecated"),
    )
)


def mask_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Masks the text and the traceback of a library's record. A processor of structlog."""
    for name in ("event", "exception"):
        if name in event:
            event[name] = masked(str(event[name]))
    return event


def masked(text: str) -> str:
    """Returns the text without bytes, without what looks like a credential, and not too long."""
    left_out = len(text) - MOST_CHARACTERS
    if left_out > 0:
        text = text[:MOST_CHARACTERS]
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return f"{text} [{left_out} more characters]" if left_out > 0 else text


class ActionableRecords(logging.Filter):
    """Drops the records of model libraries on which an operator cannot act."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is written."""
        return not any(
            record.name.startswith(library) and text.match(record.getMessage())
            for library, text in _NOT_ACTIONABLE
        )


class LibraryLimit(logging.Filter):
    """Drops records of a library beyond ten in ten seconds from one place of its code.

    The first record of the next period says how many were dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: OrderedDict[tuple[str, str, int], list[float]] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is written."""
        if record.name.partition(".")[0] == OWN_LOGGERS:
            return True
        place = (record.name, record.pathname, record.lineno)
        now = time.monotonic()
        began, count = self._places.pop(place, (now, 0.0))
        is_new_period = now - began >= _PERIOD_SECONDS
        if is_new_period and count > _MOST_OF_A_PERIOD:
            dropped = int(count) - _MOST_OF_A_PERIOD
            record.msg = f"{record.getMessage()} [{dropped} more records were dropped]"
            record.args = ()
        self._places[place] = [now, 1.0] if is_new_period else [began, count + 1]
        if len(self._places) > _MOST_PLACES:
            self._places.popitem(last=False)
        return is_new_period or count < _MOST_OF_A_PERIOD
