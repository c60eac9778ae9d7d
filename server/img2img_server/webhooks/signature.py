"""Standard Webhooks (https://www.standardwebhooks.com): the headers that identify and sign a body.

webhook-id: msg_10000042               the same in every attempt
webhook-timestamp: 1767225600          Unix seconds of this attempt
webhook-signature: v1,<base64> ...     HMAC-SHA256 over "{id}.{timestamp}.{body}"
"""

from __future__ import annotations

import base64
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from standardwebhooks import Webhook

from img2img_server.domain.tenants import tenant_name
from img2img_server.reloaded_files import ReloadedFiles
from img2img_server.setting_files import read_text
from img2img_server.settings import SettingsError

SETTING: Final = "IMG2IMG_WEBHOOK_SECRETS_FILE"
_PREFIX = "whsec_"
_LEAST_BYTES, _MOST_BYTES = 24, 64


class Signer:
    """Signs webhooks with every secret: two while receivers change from one to the other.

    A tenant can have secrets of its own, so that no tenant can sign what another one receives:

        shop = ["whsec_…"]
        lab = ["whsec_…", "whsec_…"]
    """

    def __init__(self, secrets: str = "", file: Path | None = None) -> None:
        """Args:
            secrets: The setting webhook_secret: secrets separated by spaces, for tenants that the
                file does not name. Empty: their webhooks are not signed.
            file: The setting webhook_secrets_file: TOML with a list of secrets for each tenant. It
                is read again when it changes.

        Raises:
            SettingsError: a secret is not "whsec_" and the base64 of 24 to 64 bytes, no tenant can
                have a name in the file, or the file cannot be used.
        """
        self._keys = _keys(secrets.split(), "IMG2IMG_WEBHOOK_SECRET")
        self._file = (
            ReloadedFiles("webhook_secrets_file", [file], lambda: _read(file)) if file else None
        )

    def headers(self, job_id: int, timestamp: int, body: bytes, tenant: str = "") -> dict[str, str]:
        """Returns the headers of one attempt. `timestamp`: Unix seconds; `body`: as sent."""
        message_id = f"msg_{job_id}"
        headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
        moment, text = datetime.fromtimestamp(timestamp, UTC), body.decode()
        if keys := self._of(tenant):
            signatures = [key.sign(message_id, moment, text) for key in keys]
            headers["webhook-signature"] = " ".join(signatures)
        return headers

    def _of(self, tenant: str) -> Sequence[Webhook]:
        own = self._file.current().get(tenant) if self._file else None
        return own or self._keys


def _read(file: Path) -> Mapping[str, Sequence[Webhook]]:
    where = f"{SETTING}: {file}"
    try:
        secrets = tomllib.loads(read_text(file))
    except OSError as error:
        raise SettingsError(f"{where} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where} is no TOML file: {error}") from error
    found = {}
    for tenant, own in secrets.items():
        try:
            tenant_name(tenant)
        except ValueError as error:
            raise SettingsError(
                f"{where}: the name of a tenant {error}; it is {tenant!r}"
            ) from error
        if not isinstance(own, list) or not own or not all(isinstance(each, str) for each in own):
            raise SettingsError(f"{where}: {tenant} must be a list of secrets")
        found[tenant] = _keys(own, f"{where}: {tenant}")
    return found


def _keys(secrets: Sequence[str], where: str) -> Sequence[Webhook]:
    return [Webhook(_checked(secret, where)) for secret in secrets]


def _checked(secret: str, where: str) -> str:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX) + "==")
    except ValueError:  # It is binascii.Error, or says that a character is not ASCII.
        key = b""
    if not secret.startswith(_PREFIX) or not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise SettingsError(
            f"{where}: every secret must be whsec_ and the base64 of 24 to 64 bytes"
        )
    return secret
