"""API keys: stored as hashes, each with its tenant and permissions.

    [[keys]]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    tenant = "shop"
    permissions = ["storage", "unsafe"]
    rate_limit = 60

`storage`: may change the tenant's S3 settings. `operate`: may make the calls that concern every
tenant, like a restart of the workers. `manage`: both. `unsafe`: may turn the safety checker off.
`rate_limit`: jobs a minute, 0 for any number; without it the setting of that name holds. Keys are
random and long (`img2img-server keys` makes one), so a plain SHA-256 needs no salt.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from img2img_server.errors import PermissionDeniedError
from img2img_server.setting_files import read_text
from img2img_server.settings import DEV_KEY, Settings, SettingsError

_MANAGE = frozenset({"storage", "operate"})  # what the permission "manage" stands for
PERMISSIONS = _MANAGE | {"manage", "unsafe"}
_NAMES = frozenset({"sha256", "tenant", "permissions", "rate_limit"})
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Principal:
    """The tenant and the rights of a key. `rate_limit` None: that of the settings."""

    tenant: str
    permissions: frozenset[str] = frozenset()
    rate_limit: int | None = None
    key_id: str = ""  # identifies the key; is not secret

    def require(self, permission: str) -> None:
        """Raises PermissionDeniedError if the key lacks the permission."""
        if permission not in self.permissions:
            raise PermissionDeniedError(permission)


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    principal: Principal


class KeyRing:
    """The keys of a file, which is read again when it changes, and the development key."""

    def __init__(self, file: Path | None, *, dev_key: bool) -> None:
        """Raises SettingsError when the file cannot be used."""
        self._file = file
        self._fixed = [_dev_entry()] if dev_key else []
        self._stamp: tuple[int, int] | None = None
        self._refused: tuple[int, int] | str | None = None  # what was already logged
        self._entries: list[_Entry] = []
        if file is not None:
            self._stamp, self._entries = _stamp(file), _read(file)

    @property
    def is_empty(self) -> bool:
        return not self._fixed and not self._entries

    def authenticate(self, key: str) -> Principal | None:
        """Returns the principal of the key, or None. Takes the same time for every wrong key."""
        self._refresh()
        digest = _digest(key)
        found = None
        for entry in (*self._fixed, *self._entries):
            if hmac.compare_digest(entry.digest, digest):
                found = entry.principal
        return found

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            stamp = _stamp(self._file)
        except SettingsError as error:
            self._refuse(str(error), error)
            return
        if stamp in (self._stamp, self._refused):
            return
        try:
            self._entries = _read(self._file)
        except SettingsError as error:
            self._refuse(stamp, error)
        else:
            self._stamp, self._refused = stamp, None
            log.info("api_keys_read_again", keys=len(self._entries))

    def _refuse(self, what: tuple[int, int] | str, error: SettingsError) -> None:
        """Keeps the keys that were read before, and logs that once for each state of the file."""
        if what != self._refused:
            log.error("api_keys_file_rejected_old_keys_stay_valid", error=str(error))
        self._refused = what


def load_keys(settings: Settings) -> KeyRing:
    """Returns the keys. Raises SettingsError if they would leave the service open."""
    keys = KeyRing(settings.api_keys_file, dev_key=settings.has_open_dev_key)
    if keys.is_empty:
        file = settings.api_keys_file
        fault = f"{file} has no keys" if file else "is not set"
        raise SettingsError(f"IMG2IMG_API_KEYS_FILE: {fault}: make one with `img2img-server keys`")
    settings.refuse_open_dev_key(settings.grpc_host)
    return keys


def new_key(tenant: str, permissions: list[str], rate_limit: int | None = None) -> tuple[str, str]:
    """Makes a key. Returns the key and its entry for the file; only store the entry.

    Raises:
        SettingsError: an api would refuse the entry.
    """
    key = "i2i_" + secrets.token_urlsafe(32)
    values = {
        "sha256": _digest(key).hex(),
        "tenant": tenant,
        "permissions": permissions,
        **({} if rate_limit is None else {"rate_limit": rate_limit}),
    }
    mistakes: list[str] = []
    _entry(values, "", mistakes)
    if mistakes:
        raise SettingsError("\n".join(mistakes))
    # Strings, lists and integers are written in TOML as in JSON.
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return key, "\n".join(["[[keys]]", *lines])


def _dev_entry() -> _Entry:
    digest = _digest(DEV_KEY)
    return _Entry(digest, Principal("dev", PERMISSIONS, key_id=_key_id(digest)))


def _key_id(digest: bytes) -> str:
    return digest[:8].hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _stamp(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except OSError as error:
        raise SettingsError(_mistake(file, f"cannot be read: {error.strerror}")) from error
    return stat.st_mtime_ns, stat.st_size


def _read(file: Path) -> list[_Entry]:
    try:
        table = tomllib.loads(read_text(file))
    except OSError as error:
        raise SettingsError(_mistake(file, f"cannot be read: {error.strerror}")) from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(_mistake(file, f"is no TOML file: {error}")) from error
    if names := table.keys() - {"keys"}:
        fault = f"{', '.join(sorted(names))}: there is no such name; each key is a [[keys]] table"
        raise SettingsError(_mistake(file, fault))
    items = table.get("keys", [])
    if not (isinstance(items, list) and all(isinstance(item, dict) for item in items)):
        raise SettingsError(_mistake(file, "each key must be a table below [[keys]]"))
    mistakes: list[str] = []
    entries = [_entry(item, f"keys[{number}].", mistakes) for number, item in enumerate(items)]
    first = {entry.digest: number for number, entry in reversed(list(enumerate(entries)))}
    mistakes += [
        f"keys[{number}].sha256 is that of keys[{first[entry.digest]}] too"
        for number, entry in enumerate(entries)
        if entry.digest and first[entry.digest] != number
    ]
    if mistakes:
        raise SettingsError(*(_mistake(file, mistake) for mistake in mistakes))
    return entries


def _mistake(file: Path, fault: str) -> str:
    return f"IMG2IMG_API_KEYS_FILE: {file}: {fault}"


def _entry(item: dict[str, Any], where: str, mistakes: list[str]) -> _Entry:
    """Reads one entry and adds its mistakes to `mistakes`; `where`: the prefix of names in them."""
    digest, tenant = str(item.get("sha256", "")).lower(), str(item.get("tenant", ""))
    listed = item.get("permissions", [])
    if not (isinstance(listed, list) and all(isinstance(each, str) for each in listed)):
        mistakes.append(f"{where}permissions must be a list of strings")
        listed = []
    permissions = frozenset(listed)
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        mistakes.append(f"{where}sha256 must be 64 hexadecimal digits")
        digest = ""
    if not _TENANT.fullmatch(tenant):
        mistakes.append(
            f"{where}tenant must have 1 to 63 of the characters a-z, 0-9 and -, and must not begin "
            f"with -; it is {tenant!r}"
        )
    if unknown := permissions - PERMISSIONS:
        known = ", ".join(sorted(PERMISSIONS))
        mistakes.append(
            f"{where}permissions: {', '.join(sorted(unknown))} is not known; they are {known}"
        )
    if names := item.keys() - _NAMES:
        mistakes.append(f"{where}{', '.join(sorted(names))}: there is no such name")
    rate_limit = item.get("rate_limit")
    if rate_limit is not None and not (type(rate_limit) is int and rate_limit >= 0):
        mistakes.append(f"{where}rate_limit must be an integer of at least 0")
    if "manage" in permissions:
        permissions |= _MANAGE
    key = bytes.fromhex(digest)
    return _Entry(key, Principal(tenant, permissions, rate_limit, _key_id(key)))
