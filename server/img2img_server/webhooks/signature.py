"""Standard Webhooks (https://www.standardwebhooks.com): the headers that identify and sign a body.

webhook-id: msg_10000042               the same in every attempt
webhook-timestamp: 1767225600          Unix seconds of this attempt
webhook-signature: v1,<base64> ...     HMAC-SHA256 over "{id}.{timestamp}.{body}"
"""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime

from standardwebhooks import Webhook

from img2img_server.settings import SettingsError

_PREFIX = "whsec_"
_LEAST_BYTES, _MOST_BYTES = 24, 64


class Signer:
    """Signs webhooks with every secret: two while receivers change from one to the other."""

    def __init__(self, secrets: str = "") -> None:
        """Reads the setting webhook_secret: secrets separated by spaces. If empty, signs nothing.

        Raises:
            SettingsError: a secret is not "whsec_" and the base64 of 24 to 64 bytes.
        """
        self._keys = [Webhook(_checked(secret)) for secret in secrets.split()]

    def headers(self, job_id: int, timestamp: int, body: bytes) -> dict[str, str]:
        """Returns the headers of one attempt. `timestamp`: Unix seconds; `body`: as sent."""
        message_id = f"msg_{job_id}"
        headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
        moment, text = datetime.fromtimestamp(timestamp, UTC), body.decode()
        if self._keys:
            signatures = [key.sign(message_id, moment, text) for key in self._keys]
            headers["webhook-signature"] = " ".join(signatures)
        return headers


def _checked(secret: str) -> str:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX) + "==")
    except binascii.Error:
        key = b""
    if not secret.startswith(_PREFIX) or not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise SettingsError(
            "IMG2IMG_WEBHOOK_SECRET: every secret must be whsec_ and the base64 of 24 to 64 bytes"
        )
    return secret
