"""API keys: stored as hashes, each with its tenant and permissions.

    [[keys]]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    tenant = "shop"
    permissions = ["storage", "unsafe"]
    rate_limit = 60

`storage`: may change the tenant's S3 settings. `operate`: may make the calls that concern every
tenant, like a restart of the workers. `manage`: both of them. `unsafe`: may turn the safety checker
off. `rate_limit`: jobs a minute, 0 for any number. Default: the setting of that name. Keys are
random and long (`img2img-server keys` makes one), so a plain SHA-256 needs no salt.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import structlog
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from img2img_server.errors import PermissionDeniedError
from img2img_server.setting_files import read_text
from img2img_server.settings import DEV_KEY, Settings, SettingsError

_Permission = Literal["manage", "operate", "storage", "unsafe"]
PERMISSIONS: Final[frozenset[str]] = frozenset(get_args(_Permission))
_MANAGE: Final = frozenset({"storage", "operate"})  # the permissions that "manage" includes
_RULES: Final = {
    "keys": "must be [[keys]] tables",
    "sha256": "must be 64 hexadecimal digits",
    "tenant": "must have 1 to 63 of the characters a-z, 0-9 and -, and must not begin with -",
    "permissions": f"must be a list of any of {', '.join(sorted(PERMISSIONS))}",
    "rate_limit": "must be an integer of at least 0",
}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Principal:
    """The tenant and the rights of a key. `rate_limit` None: the limit of the settings."""

    tenant: str
    permissions: frozenset[str] = frozenset()
    rate_limit: int | None = None
    key_id: str = ""  # identifies the key; is not secret

    def require(self, permission: str) -> None:
        """Raises PermissionDeniedError if the key lacks the permission."""
        if permission not in self.permissions:
            raise PermissionDeniedError(permission)


class _Entry(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]
    tenant: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    permissions: list[_Permission] = []
    rate_limit: Annotated[int, Field(ge=0)] | None = None

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)

    def principal(self) -> Principal:
        permissions = frozenset[str](self.permissions)
        if "manage" in permissions:
            permissions |= _MANAGE
        return Principal(self.tenant, permissions, self.rate_limit, _key_id(self.digest))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[_Entry] = []


class KeyRing:
    """The keys of a file, which is read again when it changes, and the development key."""

    def __init__(self, file: Path | None, *, dev_key: bool) -> None:
        """Raises SettingsError if the file cannot be used."""
        self._file = file
        self._fixed = _dev_principal() if dev_key else {}
        self._entries: dict[bytes, Principal] = {}  # the entries by the SHA-256 of the key
        self._seen = _state(file)  # the state of the file that was read last
        if file is not None:
            self._entries = _read(file)

    @property
    def is_empty(self) -> bool:
        return not self._fixed and not self._entries

    def authenticate(self, key: str) -> Principal | None:
        """Returns the principal of the key, or None."""
        self._refresh()
        # The time of the lookup depends only on the digest, which does not help to guess a key.
        digest = _digest(key)
        return self._entries.get(digest) or self._fixed.get(digest)

    def _refresh(self) -> None:
        """Reads the file if it has changed. A faulty file is logged once, and the old keys stay
        valid.
        """
        if self._file is None or (state := _state(self._file)) == self._seen:
            return
        self._seen = state
        try:
            self._entries = _read(self._file)
        except SettingsError as error:
            log.error("api_keys_file_rejected_old_keys_stay_valid", error=str(error))
        else:
            log.info("api_keys_read_again", keys=len(self._entries))


def load_keys(settings: Settings) -> KeyRing:
    """Returns the keys. Raises SettingsError if there are none or `dev-key` would be exposed."""
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
    try:
        _Entry.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_mistakes(error))) from error
    # Strings, lists and integers are written in TOML as in JSON.
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return key, "\n".join(["[[keys]]", *lines])


def _dev_principal() -> dict[bytes, Principal]:
    digest = _digest(DEV_KEY)
    return {digest: Principal("dev", PERMISSIONS, key_id=_key_id(digest))}


def _key_id(digest: bytes) -> str:
    return digest[:8].hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _state(file: Path | None) -> tuple[int, int] | None:
    """Returns the time of the last change and the size, or None if the file cannot be read."""
    try:
        stat = file.stat() if file else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size) if stat else None


def _read(file: Path) -> dict[bytes, Principal]:
    try:
        entries = _File.model_validate(tomllib.loads(read_text(file))).keys
    except OSError as error:
        raise SettingsError(_mistake(file, f"cannot be read: {error.strerror}")) from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(_mistake(file, f"is no TOML file: {error}")) from error
    except ValidationError as error:
        raise SettingsError(*(_mistake(file, mistake) for mistake in _mistakes(error))) from error
    first = {entry.digest: number for number, entry in reversed(list(enumerate(entries)))}
    repeated = [
        _mistake(file, f"keys[{number}].sha256 is that of keys[{first[entry.digest]}] too")
        for number, entry in enumerate(entries)
        if first[entry.digest] != number
    ]
    if repeated:
        raise SettingsError(*repeated)
    return {entry.digest: entry.principal() for entry in entries}


def _mistake(file: Path, fault: str) -> str:
    return f"IMG2IMG_API_KEYS_FILE: {file}: {fault}"


def _mistakes(error: ValidationError) -> list[str]:
    """Returns a sentence for each mistake, without values that may be a key."""
    sentences = []
    for fault in error.errors():
        path = list(fault["loc"])
        while isinstance(path[-1], int):
            path.pop()
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]
        if fault["type"] == "extra_forbidden":
            sentences.append(f"{where}: there is no such name")
            continue
        shown = fault["type"] != "missing" and path[-1] in ("tenant", "permissions", "rate_limit")
        value = f"; it is {fault['input']!r}" if shown else ""
        sentences.append(f"{where} {_RULES[str(path[-1])]}{value}")
    return sentences
