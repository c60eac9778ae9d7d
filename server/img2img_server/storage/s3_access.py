"""Endpoint, region, bucket and credentials of S3, read from the settings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import urlsplit

import urllib3
from minio import Minio

from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.s3_credentials import RefreshingProvider, Source, choose_source

ENDPOINT: Final = "IMG2IMG_S3_ENDPOINT_URL"
REGION: Final = "IMG2IMG_S3_REGION"
DEFAULT_REGION: Final = "us-east-1"
BUCKET: Final = "IMG2IMG_S3_BUCKET"
_AWS: Final = re.compile(
    r"s3[.-](?:dualstack\.|fips\.)?(?P<region>[a-z]{2}(?:-[a-z]+)+-\d)\.amazonaws\.com(?:\.cn)?"
)


@dataclass(frozen=True)
class S3Access:
    """The arguments of a connection to the store. `host`: host and port."""

    host: str
    secure: bool
    region: str
    bucket: str
    source: Source

    @classmethod
    def from_settings(cls, settings: Settings, env: Mapping[str, str] | None = None) -> S3Access:
        """Reads the settings and the AWS variables of `env`, by default of the process.

        Raises SettingsError, which names the setting.
        """
        env = os.environ if env is None else env
        endpoint = urlsplit(settings.s3_endpoint_url)
        if not endpoint.hostname:
            raise SettingsError(f"{ENDPOINT}: must name an S3 server")
        access = cls(
            endpoint.netloc,
            endpoint.scheme == "https",
            _region(settings, endpoint.hostname, env),
            settings.s3_bucket,
            choose_source(settings, env),
        )
        with urllib3.PoolManager() as connections:
            access.client(connections)  # raises for values that the SDK refuses
        return access

    def public_client(self, endpoint_url: str, connections: urllib3.PoolManager) -> Minio | None:
        """Creates a client for another address of the store, which only signs URLs; None if there
        is none. Raises SettingsError.
        """
        endpoint = urlsplit(endpoint_url)
        if not endpoint.hostname:
            return None
        other = replace(self, host=endpoint.netloc, secure=endpoint.scheme == "https")
        return other.client(connections)

    def client(self, connections: urllib3.PoolManager) -> Minio:
        """Creates a client, which connects with its first call. Raises SettingsError."""
        try:
            return Minio(
                self.host,
                secure=self.secure,
                region=self.region,
                credentials=RefreshingProvider(self.source),
                http_client=connections,
            )
        except ValueError as error:  # The SDK refuses the value, for example a bucket in the host.
            setting = REGION if "region" in str(error) else ENDPOINT
            raise SettingsError(f"{setting}: {error}") from error


def _region(settings: Settings, host: str, env: Mapping[str, str]) -> str:
    """Returns the region to sign for: the setting's, else at AWS the host's or AWS_REGION."""
    found = _AWS.fullmatch(host)
    ours = settings.s3_region if "s3_region" in settings.model_fields_set else ""
    if found and ours and ours != found["region"]:
        raise SettingsError(
            f"{REGION}: {ours} is not the region of {host}; leave it empty or set {found['region']}"
        )
    if ours:
        return ours
    if found:
        return found["region"]
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
    return DEFAULT_REGION
