"""API keys: stored as hashes, each with its tenant and permissions.

    [[keys]]
    sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
    tenant = "shop"
    permissions = ["storage", "unsafe"]
    rate_limit = 60
    id = "shop-web-2"
    label = "the web shop, second key"
    expire_time = 2027-06-30T00:00:00Z

`storage`: may change the tenant's S3 settings. `operate`: may make the calls that concern every
tenant, like a restart of the workers. `manage`: both of them. `unsafe`: may turn the safety checker
off. `rate_limit`: jobs a minute, 0 for any number. Default: the setting of that name. `id`: names
the key in logs and lists. Default: the first 16 digits of `sha256`. `label`: a text for people.
`expire_time`: from then on the key is refused. Keys are random and long (`img2img-server keys`
makes one), so a plain SHA-256 needs no salt.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from img2img_server import clock
from img2img_server.domain.tenants import TENANT_RULE, tenant_name
from img2img_server.errors import PermissionDeniedError
from img2img_server.reloaded_files import ReloadedFiles
from img2img_server.setting_files import read_text
from img2img_server.settings import DEV_KEY, Settings, SettingsError

_Permission = Literal["manage", "operate", "storage", "unsafe"]
PERMISSIONS: Final[frozenset[str]] = frozenset(get_args(_Permission))
_MANAGE: Final = frozenset({"storage", "operate"})  # the permissions that "manage" includes
_RULES: Final = {
    "keys": "must be [[keys]] tables",
    "sha256": "must be 64 hexadecimal digits",
    "tenant": TENANT_RULE,
    "permissions": f"must be a list of any of {', '.join(sorted(PERMISSIONS))}",
    "rate_limit": "must be an integer of at least 0",
    "id": "must be a letter or digit and up to 62 of the characters a-z, 0-9, -, _ and .",
    "label": "must be a text of at most 200 characters in one line",
    "expire_time": "must be a date and time with an offset, such as 2027-06-30T00:00:00Z",
}
_SHOWN: Final = frozenset(_RULES) - {"sha256", "keys"}  # values that cannot be a key


@dataclass(frozen=True, slots=True)
class Principal:
    """The tenant and the rights of a key. `rate_limit` None: the limit of the settings.

    `key_id`: identifies the key; is not secret. `expire_time`: Unix seconds; None: never.
    `only_job`: id of the only job that may be watched, for a token made with the key.
    """

    tenant: str
    permissions: frozenset[str] = frozenset()
    rate_limit: int | None = None
    key_id: str = ""
    label: str = ""
    expire_time: float | None = None
    only_job: int | None = None

    @property
    def has_expired(self) -> bool:
        return self.expire_time is not None and self.expire_time <= clock.now()

    def require(self, permission: str) -> None:
        """Raises PermissionDeniedError if the key lacks the permission."""
        if permission not in self.permissions:
            raise PermissionDeniedError(permission)


class _Entry(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]
    tenant: Annotated[str, AfterValidator(tenant_name)]
    permissions: list[_Permission] = []
    rate_limit: Annotated[int, Field(ge=0)] | None = None
    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] = ""
    label: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,200}$")] = ""
    expire_time: AwareDatetime | None = None

    @property
    def key_id(self) -> str:
        return self.id or _key_id(self.digest)

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)

    def principal(self) -> Principal:
        permissions = frozenset[str](self.permissions)
        if "manage" in permissions:
            permissions |= _MANAGE
        end = self.expire_time.timestamp() if self.expire_time else None
        return Principal(self.tenant, permissions, self.rate_limit, self.key_id, self.label, end)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: list[_Entry] = []


class KeyRing:
    """The keys of a file, which is read again when it changes, and the development key."""

    def __init__(self, file: Path | None, *, dev_key: bool) -> None:
        """Raises SettingsError if the file cannot be used."""
        self._fixed = _dev_principal() if dev_key else {}
        self._file = ReloadedFiles("api_keys_file", [file], lambda: _read(file)) if file else None

    @property
    def is_empty(self) -> bool:
        return not self.principals()

    def principals(self) -> Sequence[Principal]:
        """Returns the principals of all keys, in the order of the file; expired ones too."""
        return [*self._fixed.values(), *self._entries().values()]

    def authenticate(self, key: str) -> Principal | None:
        """Returns the principal of the key, which may have expired, or None."""
        # The time of the lookup depends only on the digest, which does not help to guess a key.
        digest = _digest(key)
        return self._entries().get(digest) or self._fixed.get(digest)

    def _entries(self) -> Mapping[bytes, Principal]:
        return self._file.current() if self._file else {}


def load_keys(settings: Settings) -> KeyRing:
    """Returns the keys. Raises SettingsError if there are none or `dev-key` would be exposed."""
    keys = KeyRing(settings.api_keys_file, dev_key=settings.has_open_dev_key)
    if keys.is_empty:
        file = settings.api_keys_file
        fault = f"{file} has no keys" if file else "is not set"
        raise SettingsError(f"IMG2IMG_API_KEYS_FILE: {fault}: make one with `img2img-server keys`")
    settings.refuse_open_dev_key(settings.grpc_host)
    return keys


def new_key(
    tenant: str,
    permissions: list[str],
    rate_limit: int | None = None,
    *,
    key_id: str = "",
    label: str = "",
    expire_time: datetime | None = None,
) -> tuple[str, str]:
    """Makes a key. Returns the key and its entry for the file; only store the entry.

    Raises:
        SettingsError: an api would refuse the entry.
    """
    key = "i2i_" + secrets.token_urlsafe(32)
    chosen = {
        "rate_limit": rate_limit,
        "id": key_id or None,
        "label": label or None,
        "expire_time": expire_time,
    }
    values: dict[str, Any] = {
        "sha256": _digest(key).hex(),
        "tenant": tenant,
        "permissions": permissions,
        **{name: value for name, value in chosen.items() if value is not None},
    }
    try:
        _Entry.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_mistakes(error))) from error
    lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
    return key, "\n".join(["[[keys]]", *lines])


def _toml(value: Any) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    # TOML writes strings, lists and integers as JSON does, but has no pairs of surrogates.
    return json.dumps(value, ensure_ascii=False)


def _dev_principal() -> dict[bytes, Principal]:
    digest = _digest(DEV_KEY)
    return {digest: Principal("dev", PERMISSIONS, key_id=_key_id(digest))}


def _key_id(digest: bytes) -> str:
    return digest[:8].hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _read(file: Path) -> dict[bytes, Principal]:
    try:
        entries = _File.model_validate(tomllib.loads(read_text(file))).keys
    except OSError as error:
        raise SettingsError(_mistake(file, f"cannot be read: {error.strerror}")) from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(_mistake(file, f"is no TOML file: {error}")) from error
    except ValidationError as error:
        raise SettingsError(*(_mistake(file, mistake) for mistake in _mistakes(error))) from error
    if repeated := [*_repeated(entries, "sha256"), *_repeated(entries, "key_id")]:
        raise SettingsError(*(_mistake(file, mistake) for mistake in repeated))
    return {entry.digest: entry.principal() for entry in entries}


def _repeated(entries: Sequence[_Entry], name: str) -> Iterator[str]:
    """Yields a sentence for each entry with the value of an earlier one."""
    values = [getattr(entry, name).lower() for entry in entries]
    counts = Counter(values)
    shown = name.removeprefix("key_")
    for number, value in enumerate(values):
        if counts[value] > 1 and (first := values.index(value)) != number:
            yield f"keys[{number}].{shown} is that of keys[{first}] too"


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
        shown = fault["type"] != "missing" and path[-1] in _SHOWN
        value = f"; it is {fault['input']!r}" if shown else ""
        sentences.append(f"{where} {_RULES[str(path[-1])]}{value}")
    return sentences
