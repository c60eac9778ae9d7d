"""Credentials for S3, from the settings or from the default chain of AWS.

The sources of the chain and their variables are those of the AWS SDKs: environment, web identity
(IRSA, workload identity), credentials file, container (ECS, EKS pod identity), EC2 metadata. The
first source that is configured is used. If it fails, no other source is tried.
"""

from __future__ import annotations

import configparser
import ipaddress
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import urllib3
from minio.credentials.credentials import Credentials
from minio.credentials.providers import IamAwsProvider, Provider, WebIdentityProvider

from img2img_server.setting_files import read_text
from img2img_server.settings import Settings

# how long before the expiry credentials are renewed; AWS offers new ones by then
REFRESH: Final = timedelta(minutes=5)
RETRY: Final = timedelta(seconds=30)  # seconds between two attempts to renew valid credentials
LEAST: Final = timedelta(seconds=10)  # credentials that expire within this time count as expired
_OURS: Final = "IMG2IMG_S3_ACCESS_KEY"
_IDENTITY_FILE: Final = "AWS_WEB_IDENTITY_TOKEN_FILE"
_TOKEN_FILE: Final = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"  # noqa: S105
_CONTAINER: Final = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
METADATA_URL: Final = "http://169.254.169.254"
_CONTAINER_URL: Final = "http://169.254.170.2"
# Hosts that may be asked for credentials without TLS: those of ECS and EKS, and this machine.
_CONTAINER_HOSTS: Final = ("localhost", "169.254.170.2", "169.254.170.23", "fd00:ec2::23")
_TIMEOUT: Final = urllib3.Timeout(connect=2.0, read=5.0)
_STATUS: Final = re.compile(r"HTTP status code (\d+)")

log = logging.getLogger(__name__)


class CredentialsError(Exception):
    """There are no credentials; the sentence says why. `setting`: the setting to correct."""

    def __init__(self, setting: str, sentence: str, *, final: bool = True) -> None:
        super().__init__(sentence)
        self.setting = setting
        self.final = final


@dataclass(frozen=True, slots=True)
class Source:
    """A source of credentials.

    Args:
        access, secret, token: The settings that hold them, for error messages.
        fetch: Reads the credentials; blocks. Raises CredentialsError.
    """

    access: str
    secret: str
    token: str
    fetch: Callable[[], Credentials]


class RefreshingProvider(Provider):
    """Provides a source's credentials and renews them before they expire; thread-safe.

    Args:
        now: The clock, in UTC.
    """

    def __init__(self, source: Source, now: Callable[[], datetime] | None = None) -> None:
        self._source = source
        self._now = now or (lambda: datetime.now(UTC))
        self._lock = threading.Lock()
        self._known: Credentials | None = None
        self._fetched_at = datetime.min.replace(tzinfo=UTC)

    def retrieve(self) -> Credentials:
        """Returns valid credentials. Raises CredentialsError."""
        with self._lock:
            left = self._left()
            now = self._now()
            if self._known is None or left < LEAST:
                self._known = self._source.fetch()
                self._fetched_at = now
            elif left < REFRESH and now - self._fetched_at > RETRY:
                self._fetched_at = now
                try:
                    self._known = self._source.fetch()
                except CredentialsError as error:
                    log.warning("s3_credentials_not_renewed: %s", error)
            return self._known

    def _left(self) -> timedelta:
        if self._known is None or self._known.expiration is None:
            return timedelta.max
        return self._known.expiration.replace(tzinfo=UTC) - self._now()


def choose_source(settings: Settings, env: Mapping[str, str]) -> Source:
    """Returns the source that is configured. `env`: the environment with the variables of AWS."""
    if key := settings.s3_access_key.get_secret_value():
        names = _OURS, "IMG2IMG_S3_SECRET_KEY", "IMG2IMG_S3_SESSION_TOKEN"
        secret = settings.s3_secret_key.get_secret_value()
        return _static(names, key, secret, settings.s3_session_token.get_secret_value())
    names = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
    if env.get(names[0]) or env.get(names[1]):
        return _static(names, *(env.get(name, "") for name in names))
    file = Path(
        env.get("AWS_SHARED_CREDENTIALS_FILE")
        or Path(env.get("HOME") or "/") / ".aws" / "credentials"
    )
    profile = env.get("AWS_PROFILE")
    if env.get(_IDENTITY_FILE):
        return _one(_IDENTITY_FILE, lambda: _by_web_identity(env))
    if profile or env.get("AWS_SHARED_CREDENTIALS_FILE") or file.is_file():
        return _one("AWS_PROFILE", lambda: _by_file(file, profile or "default"))
    if name := next((name for name in _CONTAINER if env.get(name)), ""):
        return _one(name, lambda: _by_container(name, env))
    return _one(_OURS, lambda: _by_metadata(env, file))


def _one(name: str, fetch: Callable[[], Credentials]) -> Source:
    return Source(name, name, name, fetch)


def _static(names: tuple[str, str, str], key: str, secret: str, token: str) -> Source:
    def fetch() -> Credentials:
        for name, value in zip(names, (key, secret), strict=False):
            if not value:
                raise CredentialsError(name, f"{names[0]} and {names[1]} belong together")
        return Credentials(key, secret, token or None)

    return Source(*names, fetch)


def _by_web_identity(env: Mapping[str, str]) -> Credentials:
    token = _text(_IDENTITY_FILE, env)
    region, role = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "", "AWS_ROLE_ARN"
    own = f"https://sts.{region}.amazonaws.com" if region else "https://sts.amazonaws.com"
    endpoint = env.get("AWS_ENDPOINT_URL_STS") or own + (".cn" if region.startswith("cn-") else "")
    hint = f"the role {env.get(role) or f'({role} is not set)'} must trust this identity"

    def fetch(http: urllib3.PoolManager) -> Credentials:
        return WebIdentityProvider(
            jwt_provider_func=lambda: {"access_token": token, "expires_in": "0"},
            sts_endpoint=endpoint.rstrip("/"),
            role_arn=env.get(role),
            role_session_name=env.get("AWS_ROLE_SESSION_NAME") or "img2img",
            http_client=http,
        ).retrieve()

    return _fetched(_IDENTITY_FILE, f"STS at {urlsplit(endpoint).netloc}", hint, fetch)


def _by_file(path: Path, profile: str) -> Credentials:
    # minio's provider is not used: a "%" in a key breaks its parser.
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(read_text(path))
    except (OSError, configparser.Error) as error:
        why = getattr(error, "strerror", "") or "it is not in the form of AWS"
        raise CredentialsError("AWS_PROFILE", f"{path} cannot be read: {why}") from None
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    key, secret, token = (parser.get(profile, name, fallback="") for name in names)
    if not (key and secret):
        why = (
            f"profile {profile} of {path} has no aws_access_key_id and aws_secret_access_key; "
            "profiles with SSO, role_arn or credential_process are not supported"
        )
        raise CredentialsError("AWS_PROFILE", why)
    return Credentials(key, secret, token or None)


def _by_container(name: str, env: Mapping[str, str]) -> Credentials:
    url = env[name] if name.endswith("FULL_URI") else f"{_CONTAINER_URL}/{env[name].lstrip('/')}"
    parts = urlsplit(url)
    if not (parts.scheme == "https" or (parts.scheme == "http" and _is_near(parts.hostname or ""))):
        why = f"{parts.netloc} must have https or be an address of this machine, of ECS or of EKS"
        raise CredentialsError(name, why)
    token = _text(_TOKEN_FILE, env) or env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
    hint = "the service account or task must have a role"
    # minio's `retrieve` is not used: it sends the token to any host, with the file's last line
    # break.
    headers: dict[str, str | list[str] | tuple[str]] = {"Authorization": token} if token else {}
    return _fetched(
        name, parts.netloc, hint, lambda http: IamAwsProvider(http_client=http).fetch(url, headers)
    )


def _is_near(host: str) -> bool:
    try:
        return host in _CONTAINER_HOSTS or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _by_metadata(env: Mapping[str, str], file: Path) -> Credentials:
    url = (env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or METADATA_URL).rstrip("/")
    where = f"the EC2 metadata service at {urlsplit(url).netloc}"
    try:
        if env.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            raise CredentialsError(_OURS, "AWS_EC2_METADATA_DISABLED is true")
        hint = "the instance must have a role"
        return _fetched(
            *(_OURS, where, hint),
            lambda http: IamAwsProvider(custom_endpoint=url, http_client=http).retrieve(),
        )
    except CredentialsError as error:
        tried = ", ".join(("AWS_ACCESS_KEY_ID", _IDENTITY_FILE, *_CONTAINER))
        why = (
            "there are no credentials for S3: set IMG2IMG_S3_ACCESS_KEY and IMG2IMG_S3_SECRET_KEY. "
            f"Of the AWS chain, {tried} are not set, {file} does not exist and {error}"
        )
        raise CredentialsError(_OURS, why) from None


def _text(name: str, env: Mapping[str, str]) -> str:
    """Returns the content of the file that a variable names, or "" if the variable is not set."""
    path = env.get(name)
    try:
        return read_text(Path(path)).strip() if path else ""
    except OSError as error:
        raise CredentialsError(name, f"{path} cannot be read: {error.strerror}") from None


def _fetched(
    setting: str, where: str, hint: str, fetch: Callable[[urllib3.PoolManager], Credentials]
) -> Credentials:
    """Returns the result of `fetch`. Replaces its errors, whose URLs contain tokens."""
    why, final = "", False
    try:
        with urllib3.PoolManager(retries=False, timeout=_TIMEOUT) as http:
            return fetch(http)
    except urllib3.exceptions.TimeoutError:
        why = f"{where} does not answer"
    except (urllib3.exceptions.HTTPError, OSError) as error:
        why = f"{where} cannot be reached ({type(error).__name__})"
    except Exception as error:
        status = _STATUS.search(str(error))
        final = status is None or status[1].startswith("4")
        said = f"answered {status[1]}" if status else "did not answer with credentials"
        why = f"{where} {said}: {hint}"
    raise CredentialsError(setting, why, final=final)
