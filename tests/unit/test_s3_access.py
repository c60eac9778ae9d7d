"""The settings of S3: valid and invalid endpoints, regions and buckets."""

from __future__ import annotations

from typing import Any

import pytest
import urllib3

from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.s3_access import S3Access


def access(url: str, *, env: dict[str, str] | None = None, **more: Any) -> S3Access:
    keys = {"s3_access_key": "a", "s3_secret_key": "b"}
    return S3Access.from_settings(Settings(s3_endpoint_url=url, **(keys | more)), env or {})


@pytest.mark.parametrize(
    ("url", "more", "host", "region"),
    [
        ("http://minio:9000", {}, "minio:9000", "us-east-1"),
        ("HTTP://minio:9000/", {}, "minio:9000", "us-east-1"),
        ("https://[::1]:9000", {}, "[::1]:9000", "us-east-1"),
        ("https://s3.amazonaws.com", {}, "s3.amazonaws.com", "us-east-1"),
        (
            "https://s3.eu-central-1.amazonaws.com",
            {},
            "s3.eu-central-1.amazonaws.com",
            "eu-central-1",
        ),
        (
            "https://s3.dualstack.eu-west-1.amazonaws.com",
            {},
            "s3.dualstack.eu-west-1.amazonaws.com",
            "eu-west-1",
        ),
        (
            "https://s3.cn-north-1.amazonaws.com.cn",
            {},
            "s3.cn-north-1.amazonaws.com.cn",
            "cn-north-1",
        ),
        (
            "https://abc.r2.cloudflarestorage.com",
            {"s3_region": "auto"},
            "abc.r2.cloudflarestorage.com",
            "auto",
        ),
        (
            "https://s3.us-west-004.backblazeb2.com",
            {"s3_region": "us-west-004"},
            "s3.us-west-004.backblazeb2.com",
            "us-west-004",
        ),
        ("https://storage.googleapis.com", {}, "storage.googleapis.com", "us-east-1"),
    ],
)
def test_an_endpoint_is_read(url: str, more: dict[str, Any], host: str, region: str) -> None:
    found = access(url, **more)
    assert (found.host, found.region) == (host, region)
    with urllib3.PoolManager() as connections:
        found.client(connections)


def test_the_region_of_aws_comes_from_its_environment() -> None:
    env = {"AWS_REGION": "eu-north-1"}
    assert access("https://s3.amazonaws.com", env=env).region == "eu-north-1"
    assert access("http://minio:9000", env=env).region == "us-east-1"
    ours = access("https://s3.amazonaws.com", env=env, s3_region="us-west-2")
    assert ours.region == "us-west-2"


@pytest.mark.parametrize(
    ("url", "more", "why"),
    [
        ("minio:9000", {}, "does not begin with http:// or https://"),
        ("ftp://minio", {}, "does not begin with http"),
        ("https://", {}, "has no host"),
        ("https://h:port", {}, "has a host or port that is not well formed"),
        ("https://key:secret-1@h", {}, "contains a user name or password"),
        ("https://h/s3", {}, "must not have a path"),
        ("https://h/?x=1", {}, "must not have a path, a query"),
        ("https://h#x", {}, "must not have a path, a query"),
        ("", {}, "ENDPOINT_URL: must name an S3 server"),
        ("https://bucket.s3.eu-west-1.amazonaws.com", {}, "ENDPOINT_URL: "),
        ("https://h", {"s3_bucket": ""}, "must be the name of a bucket"),
        ("https://h", {"s3_bucket": "a/b"}, "must be the name of a bucket"),
        ("https://h", {"s3_region": "a b"}, "S3_REGION: "),
        (
            "https://s3.eu-west-1.amazonaws.com",
            {"s3_region": "us-east-1"},
            "S3_REGION: us-east-1 is not the region of s3.eu-west-1",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(url: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises((SettingsError, ValueError), match=why):
        access(url, **more)


@pytest.mark.parametrize(
    "more", [{"s3_access_key": "a"}, {"s3_secret_key": "b"}, {"s3_session_token": "c"}]
)
def test_one_half_of_the_keys_is_a_mistake(more: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="IMG2IMG_S3_ACCESS_KEY"):
        Settings(**more)
