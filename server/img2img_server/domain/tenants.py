"""The rule for names of tenants, for every file, setting and command that names one."""

from __future__ import annotations

import re
from typing import Final

TENANT_RULE: Final = "must have 1 to 63 of the characters a-z, 0-9 and -, and must not begin with -"
TENANT_PATTERN: Final = "[a-z0-9][a-z0-9-]{0,62}"


def tenant_name(text: str) -> str:
    """Returns the text if a tenant can have this name. Raises ValueError with TENANT_RULE."""
    if not re.fullmatch(TENANT_PATTERN, text, re.ASCII):
        raise ValueError(TENANT_RULE)
    return text
