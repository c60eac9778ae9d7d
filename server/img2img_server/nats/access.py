"""Addresses, credentials and TLS files of NATS, read from the settings."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from img2img_server.settings import Settings, SettingsError

URL: Final = "IMG2IMG_NATS_URL"
DEFAULT_PORT: Final = 4222
WEBSOCKET: Final = ("ws", "wss")
_SCHEMES: Final = ("nats", "tls", *WEBSOCKET)


@dataclass(frozen=True, slots=True)
class Login:
    """Credentials for NATS; `token` excludes user and password."""

    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.user or self.password or self.token)


@dataclass(frozen=True)
class NatsAccess:
    """The servers of a cluster, and how to log in to each of them.

    Attributes:
        servers: URLs without credentials.
        source: The setting that holds the credentials, for error messages.
        ca_file: PEM certificates to trust instead of the system's.
        cert_file, key_file: The client's own certificate.
    """

    servers: tuple[str, ...]
    login: Login = Login()
    source: str = URL
    creds_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    @property
    def needs_tls(self) -> bool:
        """Whether connections without TLS must be refused."""
        secure = any(server.startswith(("tls:", "wss:")) for server in self.servers)
        return secure or bool(self.ca_file or self.cert_file)

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Reads the TLS files. Raises SettingsError when a file cannot be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise _unusable("IMG2IMG_NATS_CA_FILE", self.ca_file, error) from error
        if self.cert_file:
            try:
                context.load_cert_chain(self.cert_file, self.key_file)
            except OSError as error:
                raise _unusable("IMG2IMG_NATS_CERT_FILE", self.cert_file, error) from error
        return context

    @classmethod
    def of(cls, urls: Sequence[str]) -> NatsAccess:
        """Reads NATS URLs, comma separated as in IMG2IMG_NATS_URL. Raises SettingsError."""
        found = [_server(url.strip()) for url in urls if url.strip()]
        if not found:
            raise SettingsError(f"{URL}: no server is named, for example nats://nats:4222")
        servers = tuple(server for server, _ in found)
        if len({server.startswith("ws") for server in servers}) > 1:
            raise SettingsError(f"{URL}: ws:// and nats:// servers cannot be mixed")
        logins = {login for _, login in found if login}
        if len(logins) > 1:
            raise SettingsError(f"{URL}: all servers must have the same credentials")
        return cls(servers, logins.pop() if logins else Login())

    @classmethod
    def from_settings(cls, settings: Settings) -> NatsAccess:
        """Reads the settings. Raises SettingsError, which names the setting and no password."""
        access = cls.of(settings.nats_url.get_secret_value().split(","))
        plain = any(server.startswith("ws:") for server in access.servers)
        if plain and (settings.nats_ca_file or settings.nats_cert_file):
            raise SettingsError(
                f"{URL}: ws:// has no TLS, which the certificates need: write wss://"
            )
        login, source = access.login, URL
        ours = Login(
            settings.nats_user,
            settings.nats_password.get_secret_value(),
            settings.nats_token.get_secret_value(),
        )
        if ours and login:
            raise SettingsError(
                f"{URL}: give the credentials either there or in IMG2IMG_NATS_USER, "
                "IMG2IMG_NATS_PASSWORD and IMG2IMG_NATS_TOKEN, not in both"
            )
        if ours:
            login = ours
            source = "IMG2IMG_NATS_TOKEN" if ours.token else "IMG2IMG_NATS_PASSWORD"
        elif settings.nats_creds_file:
            source = "IMG2IMG_NATS_CREDS_FILE"
        return cls(
            access.servers,
            login,
            source,
            settings.nats_creds_file,
            settings.nats_ca_file,
            settings.nats_cert_file,
            settings.nats_key_file,
        )


def _unusable(setting: str, path: Path | None, error: OSError) -> SettingsError:
    why = error.strerror or getattr(error, "reason", "") or "it is no PEM file of that kind"
    return SettingsError(f"{setting}: {path} cannot be used: {why}")


def _server(url: str) -> tuple[str, Login]:
    """Splits an entry of IMG2IMG_NATS_URL. Raises SettingsError, which does not show the entry."""
    try:
        parts = urlsplit(url if "://" in url else f"nats://{url}")
        port = parts.port
    except ValueError:
        # After a "/" in the password, the parser takes the rest of the password for a port.
        raise SettingsError(
            f"{URL}: an entry is no address; in a user, password or token write "
            "/ ? # @ : , and % as %2F %3F %23 %40 %3A %2C and %25"
        ) from None
    if parts.scheme not in _SCHEMES:
        raise SettingsError(f"{URL}: the scheme must be one of {', '.join(_SCHEMES)}")
    websocket = parts.scheme in WEBSOCKET
    if parts.query or parts.fragment or (parts.path not in ("", "/") and not websocket):
        raise SettingsError(
            f"{URL}: only user, password, host and port are taken; in a user, password or token "
            "write / ? and # as %2F %3F and %23"
        )
    if not parts.hostname:
        raise SettingsError(f"{URL}: a server without a host name is listed")
    host = parts.netloc.rpartition("@")[2].rstrip(":")
    if port is None and not websocket:
        host = f"{host}:{DEFAULT_PORT}"
    address = parts._replace(netloc=host, path=parts.path if websocket else "").geturl()
    return address, _login(parts)


def _login(parts: SplitResult) -> Login:
    user = unquote(parts.username or "")
    if parts.password is None:
        return Login(token=user)
    return Login(user, unquote(parts.password))
