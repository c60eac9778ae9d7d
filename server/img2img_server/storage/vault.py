"""Encryption of what must not be read by whoever reads the bus: Fernet, with rotation."""

from __future__ import annotations

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from img2img_server.settings import SettingsError


class SealBrokenError(Exception):
    """None of the keys opens it, or it was changed."""


class Vault:
    """Seals with the first key and opens with all of them."""

    def __init__(self, keys: str) -> None:
        """Reads the setting storage_keys: Fernet keys, comma separated. Raises SettingsError."""
        try:
            self._keys = [Fernet(key.strip()) for key in keys.split(",") if key.strip()]
        except ValueError:
            raise SettingsError(
                "IMG2IMG_STORAGE_KEYS: every key must be 32 bytes as URL-safe base64"
            ) from None

    @property
    def is_empty(self) -> bool:
        """Without a key nothing can be sealed or opened."""
        return not self._keys

    def seal(self, data: bytes) -> bytes:
        """Encrypts with the first key."""
        return self._keys[0].encrypt(data)

    def open(self, sealed: bytes) -> bytes:
        """Raises SealBrokenError."""
        if self.is_empty:
            raise SealBrokenError("no storage key is configured")
        try:
            return MultiFernet(self._keys).decrypt(sealed)
        except InvalidToken:
            raise SealBrokenError("no storage key opens it") from None

    def is_current(self, sealed: bytes) -> bool:
        """Whether the first key opens it, so that the others are not needed for it."""
        try:
            self._keys[0].decrypt(sealed)
        except InvalidToken:
            return False
        return True


def new_key() -> str:
    """A random key for the setting storage_keys."""
    return Fernet.generate_key().decode()
