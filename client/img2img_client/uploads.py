"""An init image that the service keeps for several jobs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """An init image that the service keeps until `expire_time`. It can be the init image of any
    number of jobs. `name`: "uploads/{id}"."""

    name: str
    sha256: str
    size_bytes: int
    media_type: str
    expire_time: datetime
