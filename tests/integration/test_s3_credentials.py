"""Credentials for S3 from the settings and from the default chain of AWS, with real requests."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from minio.credentials.credentials import Credentials

from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.storage.s3_credentials import CredentialsError, RefreshingProvider, Source
from tests.fake_s3 import FakeS3, fake_s3
from tests.web_peers import every_request, serving

WORD = "eyJ-secret-token"


@dataclass
class Identity:
    """A server for STS and the metadata services of containers and EC2. `status`: the status of its
    responses.
    """

    url: str = ""
    status: int = 200
    text: str = ""
    requests: list[web.Request] = field(default_factory=list)
    lives: timedelta = timedelta(hours=1)

    def key(self) -> str:
        """Returns new credentials for each request."""
        return f"KEY{len(self.requests)}"

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        ends = (datetime.now(UTC) + self.lives).strftime("%Y-%m-%dT%H:%M:%SZ")
        if self.status != 200 or self.text:
            return web.Response(status=self.status, text=self.text or "no")
        if request.path.endswith("/token"):
            return web.Response(text="imds-token")
        if request.path.endswith("/security-credentials/"):
            return web.Response(text="the-role")
        if request.method == "POST":
            return web.Response(
                text="<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult>"
                f"<Credentials><AccessKeyId>{self.key()}</AccessKeyId>"
                "<SecretAccessKey>s</SecretAccessKey><SessionToken>session-1</SessionToken>"
                f"<Expiration>{ends}</Expiration></Credentials>"
                "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
            )
        found = {"AccessKeyId": self.key(), "SecretAccessKey": "s", "Token": "session-1"}
        return web.json_response(found | {"Expiration": ends, "Code": "Success"})


@pytest.fixture
async def identity() -> AsyncIterator[Identity]:
    service = Identity()
    async with serving(every_request(service.handle)) as port:
        service.url = f"http://127.0.0.1:{port}"
        yield service


@pytest.fixture
async def s3() -> AsyncIterator[FakeS3]:
    async with fake_s3() as store:
        yield store


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


async def signed_by(s3: FakeS3, **more: Any) -> tuple[str, str]:
    """Returns the access key and the session token that signed the requests of a role."""
    async with connect_blobs(Settings(s3_endpoint_url=s3.url, **more)) as blobs:
        await blobs.prepare()
    found = set()
    for headers in s3.headers:
        key = re.search(r"Credential=([^/]+)/", headers["Authorization"])
        assert key
        token = headers.get("X-Amz-Security-Token", "")
        # An attacker could remove a token that is not signed.
        assert bool(token) == ("x-amz-security-token" in headers["Authorization"])
        found.add((key[1], token))
    assert len(found) == 1
    return found.pop()


async def test_the_settings_come_first(s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    ours = {"s3_access_key": "ours", "s3_secret_key": "s"}
    assert await signed_by(s3, **ours) == ("ours", "")
    s3.headers.clear()
    assert await signed_by(s3, **ours, s3_session_token="t") == ("ours", "t")


async def test_the_environment_of_aws(s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "by-env")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t")
    assert await signed_by(s3) == ("by-env", "t")


async def test_the_credentials_file_of_aws(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "home" / ".aws" / "credentials"
    file.parent.mkdir(parents=True)
    file.write_text(
        "[default]\naws_access_key_id = by-file\naws_secret_access_key = s%s\n"
        "[other]\naws_access_key_id = by-profile\naws_secret_access_key = s\n"
        "aws_session_token = t\n[sso]\nsso_start_url = x\n"
    )
    assert await signed_by(s3) == ("by-file", "")
    s3.headers.clear()
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert await signed_by(s3) == ("by-profile", "t")
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(
        SettingsError, match=r"AWS_PROFILE: profile sso of .* has no aws_access_key"
    ):
        await signed_by(s3)


def web_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, identity: Identity) -> Path:
    file = tmp_path / "token"
    file.write_text(WORD + "\n")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(file))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/img2img")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", identity.url)
    return file


async def test_a_web_identity_becomes_a_role(
    s3: FakeS3, identity: Identity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web_identity(monkeypatch, tmp_path, identity)
    assert await signed_by(s3) == ("KEY1", "session-1")
    (request,) = identity.requests
    assert request.query["WebIdentityToken"] == WORD
    assert request.query["RoleArn"] == "arn:aws:iam::1:role/img2img"
    assert request.query["Action"] == "AssumeRoleWithWebIdentity"


@pytest.mark.parametrize(
    ("status", "text", "why"),
    [
        (403, "", "answered 403: the role arn:aws:iam::1:role/img2img must trust this identity"),
        (200, "<html>", "did not answer with credentials"),
    ],
)
async def test_a_refused_web_identity_says_so_without_the_token(
    s3: FakeS3,
    identity: Identity,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    text: str,
    why: str,
) -> None:
    web_identity(monkeypatch, tmp_path, identity)
    identity.status, identity.text = status, text
    with caplog.at_level(logging.DEBUG, "img2img_server"), pytest.raises(SettingsError) as caught:
        await signed_by(s3)
    assert str(caught.value).startswith("AWS_WEB_IDENTITY_TOKEN_FILE: STS at 127.0.0.1:")
    assert why in str(caught.value)
    assert WORD not in str(caught.value) + caplog.text
    assert s3.calls == []


async def test_a_token_file_that_is_missing_is_named(
    s3: FakeS3, identity: Identity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = web_identity(monkeypatch, tmp_path, identity)
    file.unlink()
    with pytest.raises(SettingsError, match=f"AWS_WEB_IDENTITY_TOKEN_FILE: {file} cannot be read"):
        await signed_by(s3)


async def test_a_pod_identity_asks_with_the_token_of_its_file(
    s3: FakeS3, identity: Identity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(WORD + "\n")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(file))
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{identity.url}/v1/credentials")
    assert await signed_by(s3) == ("KEY1", "session-1")
    assert identity.requests[0].headers["Authorization"] == WORD
    assert identity.requests[0].path == "/v1/credentials"


async def test_a_container_service_elsewhere_gets_no_token(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", WORD)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://192.0.2.7/v1")
    with pytest.raises(SettingsError, match=r"FULL_URI: 192\.0\.2\.7 must have https"):
        await signed_by(s3)


async def test_the_role_of_an_instance(
    s3: FakeS3, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", identity.url)
    key, token = await signed_by(s3)
    assert (key, token) == ("KEY3", "session-1")
    assert [request.method for request in identity.requests] == ["PUT", "GET", "GET"]
    assert identity.requests[2].path.endswith("/security-credentials/the-role")
    assert identity.requests[2].headers["X-aws-ec2-metadata-token"] == "imds-token"


async def test_without_any_credentials_the_settings_and_the_chain_are_named(
    s3: FakeS3, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError) as caught:
        await signed_by(s3)
    said = str(caught.value)
    assert said.startswith("IMG2IMG_S3_ACCESS_KEY: there are no credentials for S3: set ")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", ".aws/credentials"):
        assert name in said
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", identity.url)
    identity.status = 404
    with pytest.raises(SettingsError, match=r"EC2 metadata service at 127.0.0.1:\d+ answered 404"):
        await signed_by(s3)


async def test_half_a_key_in_the_environment_is_named(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    with pytest.raises(SettingsError, match=r"AWS_SECRET_ACCESS_KEY: .* belong together"):
        await signed_by(s3)


async def test_the_credentials_of_one_role_are_asked_for_once_by_many_uploads(
    s3: FakeS3, identity: Identity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web_identity(monkeypatch, tmp_path, identity)
    async with connect_blobs(Settings(s3_endpoint_url=s3.url)) as blobs:
        await asyncio.gather(*(blobs.put(f"temp/{n}", b"x", "text/plain") for n in range(20)))
    assert len(identity.requests) == 1


class Clock:
    """A simulated clock, and credentials that are valid for an hour."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.fetched = 0
        self.broken = False

    def fetch(self) -> Credentials:
        if self.broken:
            raise CredentialsError("AWS_WEB_IDENTITY_TOKEN_FILE", "away", final=False)
        self.fetched += 1
        return Credentials(f"key-{self.fetched}", "s", "t", self.now + timedelta(hours=1))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def key_at(clock: Clock) -> Callable[[timedelta], str]:
    source = Source("a", "b", "c", clock.fetch)
    provider, start = RefreshingProvider(source, now=lambda: clock.now), clock.now

    def key(after: timedelta) -> str:
        clock.now = start + after
        return provider.retrieve().access_key

    return key


def test_credentials_are_renewed_before_they_expire(
    key_at: Callable[[timedelta], str],
) -> None:
    assert key_at(timedelta(0)) == "key-1"
    assert key_at(timedelta(minutes=54)) == "key-1"
    assert key_at(timedelta(minutes=56)) == "key-2"
    assert key_at(timedelta(minutes=110)) == "key-2"
    assert key_at(timedelta(hours=5)) == "key-3"


def test_credentials_that_cannot_be_renewed_hold_until_they_expire(
    clock: Clock, key_at: Callable[[timedelta], str]
) -> None:
    assert key_at(timedelta(0)) == "key-1"
    clock.broken = True
    assert key_at(timedelta(minutes=56)) == "key-1"
    assert key_at(timedelta(minutes=59)) == "key-1"
    with pytest.raises(CredentialsError):
        key_at(timedelta(minutes=60))
    clock.broken = False
    assert key_at(timedelta(minutes=61)) == "key-2"
