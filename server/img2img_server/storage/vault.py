"""Encryption of secrets that are stored in NATS: Fernet, with rotation of keys."""

from __future__ import annotations

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from img2img_server.settings import SettingsError


class SealBrokenError(Exception):
    """No key decrypts the data, or the data was changed."""


class Vault:
    """Encrypts with the first key and decrypts with all of them."""

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
        """Whether there is no key to encrypt and decrypt with."""
        return not self._keys

    def seal(self, data: bytes) -> bytes:
        """Encrypts with the first key."""
        return self._keys[0].encrypt(data)

    def open(self, sealed: bytes) -> bytes:
        """Decrypts with any of the keys. Raises SealBrokenError."""
        if self.is_empty:
            raise SealBrokenError("no storage key is configured")
        try:
            return MultiFernet(self._keys).decrypt(sealed)
        except InvalidToken:
            raise SealBrokenError("no storage key decrypts the data") from None

    def is_current(self, sealed: bytes) -> bool:
        """Returns whether the first key decrypts the data."""
        try:
            self._keys[0].decrypt(sealed)
        except InvalidToken:
            return False
        return True


def new_key() -> str:
    """Returns a random key for the setting storage_keys."""
    return Fernet.generate_key().decode()
