"""The price of device time, which the operator may configure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

PATTERN: Final = r"^([0-9]+(\.[0-9]+)? [A-Z]{3})?$"


@dataclass(frozen=True, slots=True)
class Price:
    """The price of one device second. `currency`: an ISO 4217 code; empty: there is no price."""

    of_second: float = 0.0
    currency: str = ""

    @classmethod
    def parse(cls, text: str) -> Price:
        """Reads "0.0004 EUR"; an empty text is no price."""
        if not re.fullmatch(PATTERN, text):
            raise ValueError("a price is a number and a currency, for example 0.0004 EUR")
        if not text:
            return cls()
        number, currency = text.split()
        return cls(float(number), currency)

    def of(self, device_seconds: float) -> float:
        """Returns the price of some device seconds."""
        return self.of_second * device_seconds
