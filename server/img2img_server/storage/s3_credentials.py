"""Where the credentials for S3 come from: our settings, or the default chain of AWS.

The sources of the chain and their variables are those of the AWS SDKs: environment, web identity
(IRSA, workload identity), credentials file, container (ECS, EKS pod identity), EC2 metadata. The
first one that is configured is used; when it fails, that is an error, not a reason to go on.
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
from minio.credentials.providers import (
    IamAwsProvider,
    Provider,
    StaticProvider,
    WebIdentityProvider,
)

from img2img_server.setting_files import read_text
from img2img_server.settings import Settings

REFRESH: Final = timedelta(minutes=5)  # before they expire; AWS has new ones by then
RETRY: Final = timedelta(seconds=30)  # between two attempts to refresh what still works
LEAST: Final = timedelta(seconds=10)  # less than this left counts as expired
METADATA_URL: Final = "http://169.254.169.254"
_CONTAINER_HOST: Final = "http://169.254.170.2"
# Where credentials may be asked for without TLS: ECS and EKS, and this machine.
_CONTAINER_HOSTS: Final = frozenset({"169.254.170.2", "169.254.170.23", "fd00:ec2::23"})
_TIMEOUT: Final = urllib3.Timeout(connect=2.0, read=5.0)
_METADATA_TIMEOUT: Final = urllib3.Timeout(connect=1.0, read=2.0)
_STATUS: Final = re.compile(r"HTTP status code (\d+)")

log = logging.getLogger(__name__)


class CredentialsError(Exception):
    """There are no credentials; the sentence says why. `setting`: what to correct."""

    def __init__(self, setting: str, sentence: str, *, final: bool) -> None:
        super().__init__(sentence)
        self.setting = setting
        self.final = final


@dataclass(frozen=True, slots=True)
class Source:
    """One place for credentials.

    Args:
        access, secret, token: the settings that hold them, for error messages.
        fetch: gets them; blocks. Raises CredentialsError.
    """

    access: str
    secret: str
    token: str
    fetch: Callable[[], Credentials]


class RefreshingProvider(Provider):
    """Hands out a source's credentials and renews them before they expire; for many threads.

    Args:
        now: the clock, in UTC.
    """

    def __init__(self, source: Source, now: Callable[[], datetime] | None = None) -> None:
        self._source = source
        self._now = now or (lambda: datetime.now(UTC))
        self._lock = threading.Lock()
        self._known: Credentials | None = None
        self._fetched_at = datetime.min.replace(tzinfo=UTC)

    def retrieve(self) -> Credentials:
        """Raises CredentialsError when there are none that hold."""
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
                    log.warning("S3 credentials are not renewed yet: %s", error)
            return self._known

    def _left(self) -> timedelta:
        if self._known is None or self._known.expiration is None:
            return timedelta.max
        return self._known.expiration.replace(tzinfo=UTC) - self._now()


def choose_source(settings: Settings, env: Mapping[str, str]) -> Source:
    """The source that is configured. `env`: the environment with the variables of AWS."""
    if settings.s3_access_key.get_secret_value():
        return _static(
            *("IMG2IMG_S3_ACCESS_KEY", "IMG2IMG_S3_SECRET_KEY", "IMG2IMG_S3_SESSION_TOKEN"),
            settings.s3_access_key.get_secret_value(),
            settings.s3_secret_key.get_secret_value(),
            settings.s3_session_token.get_secret_value(),
        )
    if env.get("AWS_ACCESS_KEY_ID") or env.get("AWS_SECRET_ACCESS_KEY"):
        return _static(
            *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
            env.get("AWS_ACCESS_KEY_ID", ""),
            env.get("AWS_SECRET_ACCESS_KEY", ""),
            env.get("AWS_SESSION_TOKEN", ""),
        )
    if env.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return _one("AWS_WEB_IDENTITY_TOKEN_FILE", lambda: _by_web_identity(settings, env))
    file = _credentials_file(env)
    if env.get("AWS_PROFILE") or env.get("AWS_SHARED_CREDENTIALS_FILE") or file.is_file():
        return _one("AWS_PROFILE", lambda: _by_file(file, env.get("AWS_PROFILE") or "default"))
    for name in ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        if env.get(name):
            return _one(name, lambda name=name: _by_container(name, env))  # type: ignore[misc]
    return _one("IMG2IMG_S3_ACCESS_KEY", lambda: _by_metadata(env, file))


def _one(name: str, fetch: Callable[[], Credentials]) -> Source:
    return Source(name, name, name, fetch)


def _static(
    access: str, secret: str, token: str, access_key: str, secret_key: str, session_token: str
) -> Source:
    def fetch() -> Credentials:
        for name, value in ((access, access_key), (secret, secret_key)):
            if not value:
                raise CredentialsError(name, f"{access} and {secret} belong together", final=True)
        return StaticProvider(access_key, secret_key, session_token or None).retrieve()

    return Source(access, secret, token, fetch)


def _by_web_identity(settings: Settings, env: Mapping[str, str]) -> Credentials:
    name, role = "AWS_WEB_IDENTITY_TOKEN_FILE", env.get("AWS_ROLE_ARN")
    path = Path(env[name])
    try:
        token = read_text(path).strip()
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror}"
        raise CredentialsError(name, why, final=True) from None
    region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or ""
    own = f"https://sts.{region}.amazonaws.com" if region else "https://sts.amazonaws.com"
    endpoint = env.get("AWS_ENDPOINT_URL_STS") or own + (".cn" if region.startswith("cn-") else "")
    with urllib3.PoolManager(retries=False, timeout=_TIMEOUT) as http:
        provider = WebIdentityProvider(
            jwt_provider_func=lambda: {"access_token": token, "expires_in": "0"},
            sts_endpoint=endpoint.rstrip("/"),
            role_arn=role,
            role_session_name=env.get("AWS_ROLE_SESSION_NAME") or "img2img",
            http_client=http,
        )
        hint = f"the role {role or '(AWS_ROLE_ARN is not set)'} must trust this identity"
        return _fetched(name, f"STS at {urlsplit(endpoint).netloc}", hint, provider.retrieve)


def _credentials_file(env: Mapping[str, str]) -> Path:
    home = Path(env.get("HOME") or "/")
    return Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials")


def _by_file(path: Path, profile: str) -> Credentials:
    # Not by minio's provider: a "%" in a key breaks its parser.
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(read_text(path))
    except (OSError, configparser.Error) as error:
        why = getattr(error, "strerror", "") or "it is not in the form of AWS"
        raise CredentialsError("AWS_PROFILE", f"{path} cannot be read: {why}", final=True) from None
    key = parser.get(profile, "aws_access_key_id", fallback="")
    secret = parser.get(profile, "aws_secret_access_key", fallback="")
    if not (key and secret):
        why = (
            f"profile {profile} of {path} has no aws_access_key_id and aws_secret_access_key; "
            "profiles with SSO, role_arn or credential_process are not supported"
        )
        raise CredentialsError("AWS_PROFILE", why, final=True)
    return Credentials(key, secret, parser.get(profile, "aws_session_token", fallback="") or None)


def _by_container(name: str, env: Mapping[str, str]) -> Credentials:
    url = env[name] if name.endswith("FULL_URI") else f"{_CONTAINER_HOST}/{env[name].lstrip('/')}"
    parts = urlsplit(url)
    if not (parts.scheme == "https" or (parts.scheme == "http" and _is_near(parts.hostname))):
        why = f"{parts.netloc} must have https or be an address of this machine, of ECS or of EKS"
        raise CredentialsError(name, why, final=True)
    token = env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
    if file := env.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
        try:
            token = read_text(Path(file)).strip()
        except OSError as error:
            why = f"{file} cannot be read: {error.strerror}"
            other = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
            raise CredentialsError(other, why, final=True) from None
    with urllib3.PoolManager(retries=False, timeout=_TIMEOUT) as http:
        provider = IamAwsProvider(http_client=http)
        hint = "the service account or task must have a role"
        headers: dict[str, str | list[str] | tuple[str]] | None = (
            {"Authorization": token} if token else None
        )
        return _fetched(name, parts.netloc, hint, lambda: provider.fetch(url, headers))


def _is_near(host: str | None) -> bool:
    if host in _CONTAINER_HOSTS or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _by_metadata(env: Mapping[str, str], file: Path) -> Credentials:
    setting = "IMG2IMG_S3_ACCESS_KEY"
    url = (env.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or METADATA_URL).rstrip("/")
    tried = (
        "AWS_ACCESS_KEY_ID, AWS_WEB_IDENTITY_TOKEN_FILE, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI "
        f"and AWS_CONTAINER_CREDENTIALS_FULL_URI are not set, {file} does not exist"
    )
    cure = "there are no credentials for S3: set IMG2IMG_S3_ACCESS_KEY and IMG2IMG_S3_SECRET_KEY"
    if env.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        why = f"{cure}. Of the AWS chain, {tried} and AWS_EC2_METADATA_DISABLED is true"
        raise CredentialsError(setting, why, final=True)
    with urllib3.PoolManager(retries=False, timeout=_METADATA_TIMEOUT) as http:
        try:
            return _fetched(
                setting,
                f"the EC2 metadata service at {urlsplit(url).netloc}",
                "the instance must have a role",
                IamAwsProvider(custom_endpoint=url, http_client=http).retrieve,
            )
        except CredentialsError as error:
            why = f"{cure}. Of the AWS chain, {tried} and {error}"
            raise CredentialsError(setting, why, final=True) from None


def _fetched(setting: str, where: str, hint: str, fetch: Callable[[], Credentials]) -> Credentials:
    """What `fetch` returns. Its errors hold tokens, in the addresses: none of them goes on."""
    why, final = "", False
    try:
        return fetch()
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
