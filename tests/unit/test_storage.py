"""A tenant's S3 details: the addresses of links and uploads, their rules, and their encryption."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.fernet import Fernet

from img2img_server.compat.modelslab.server_types import WITHOUT_EFFECT, validate_server_type
from img2img_server.domain.storage import StorageDetails, validate_storage
from img2img_server.domain.violations import Reason, required
from img2img_server.settings import SettingsError
from img2img_server.storage.vault import SealBrokenError, Vault, new_key

GOOD = StorageDetails(
    public_url="https://cdn.example.com/renders/",
    region_name="eu-west-1",
    endpoint_url="https://my-bucket.s3.amazonaws.com",
    aws_access_key_id="AK-EXAMPLE",
    aws_secret_access_key="SK-EXAMPLE",
    image_directory="renders",
)


@pytest.mark.parametrize(
    ("public_url", "image_directory", "link"),
    [
        # The table of the HTTP contract.
        ("https://cdn.example.com/generations/", "generations", "cdn.example.com/generations/NAME"),
        (
            "https://my-bucket.s3.amazonaws.com/",
            "renders",
            "my-bucket.s3.amazonaws.com/renders/NAME",
        ),
        ("https://cdn.example.com//a/", "/b//", "cdn.example.com/a/b/NAME"),
        (
            "https://cdn.example.com/old-generations",
            "generations",
            "cdn.example.com/old-generations/generations/NAME",
        ),
        # More cases of the same rules.
        ("https://cdn.example.com", "a/b", "cdn.example.com/a/b/NAME"),
        ("https://cdn.example.com/x/a/b/", "a/b", "cdn.example.com/x/a/b/NAME"),
        ("https://cdn.example.com/a/b/x", "a/b", "cdn.example.com/a/b/x/a/b/NAME"),
        ("https://cdn.example.com/b", "a/b", "cdn.example.com/b/a/b/NAME"),
        ("https://cdn.example.com", "/", "cdn.example.com/NAME"),
        ("https://cdn.example.com/a", "/", "cdn.example.com/a/NAME"),
        ("https://cdn.example.com:8443/a", "b", "cdn.example.com:8443/a/b/NAME"),
        ("https://cdn.example.com/a?token=x", "b", "cdn.example.com/a/b/NAME?token=x"),
        ("https://cdn.example.com/", "my images", "cdn.example.com/my%20images/NAME"),
        (
            "https://cdn.example.com/my%20images",
            "my images",
            "cdn.example.com/my%20images/NAME",
        ),
        ("https://cdn.example.com/my images", "b", "cdn.example.com/my%20images/b/NAME"),
        ("https://cdn.example.com/%7e/ü?a=%2f", "b", "cdn.example.com/%7e/%C3%BC/b/NAME?a=%2f"),
        ("https://cdn.example.com/", "a?b#c%", "cdn.example.com/a%3Fb%23c%25/NAME"),
    ],
)
def test_a_link_is_joined_in_the_path_with_single_slashes(
    public_url: str, image_directory: str, link: str
) -> None:
    details = replace(GOOD, public_url=public_url, image_directory=image_directory)
    assert details.file_link("NAME") == f"https://{link}"


@pytest.mark.parametrize(
    ("endpoint_url", "bucket", "image_directory", "url"),
    [
        # The bucket is in the host name, in the first part of the directory, or in its own field.
        ("https://b.s3.amazonaws.com", "", "renders", "https://b.s3.amazonaws.com/renders/NAME"),
        ("https://s3.example.com/", "", "/b/renders/", "https://s3.example.com/b/renders/NAME"),
        ("https://s3.example.com", "b", "renders", "https://s3.example.com/b/renders/NAME"),
        ("http://10.0.0.1:9000//s3/", "/b/", "a//c", "http://10.0.0.1:9000/s3/b/a/c/NAME"),
        ("https://b.example.com", "", "/", "https://b.example.com/NAME"),
        (
            "https://s3.example.com",
            "b",
            "größe +",
            "https://s3.example.com/b/gr%C3%B6%C3%9Fe%20%2B/NAME",
        ),
    ],
)
def test_an_upload_goes_to_endpoint_bucket_directory_and_name(
    endpoint_url: str, bucket: str, image_directory: str, url: str
) -> None:
    details = replace(
        GOOD, endpoint_url=endpoint_url, bucket=bucket, image_directory=image_directory
    )
    assert details.upload_url("NAME") == url


@pytest.mark.parametrize("deploy_type", ["realtime", *sorted(WITHOUT_EFFECT)])
def test_modelslabs_server_types_are_known(deploy_type: str) -> None:
    assert len(WITHOUT_EFFECT) == 16
    assert validate_server_type(deploy_type) == []


def test_another_server_type_is_not_supported() -> None:
    (found,) = validate_server_type("toaster")
    assert (found.field, found.reason) == ("deploy_type", Reason.NOT_SUPPORTED)


def test_every_missing_detail_is_reported_at_once() -> None:
    nothing = StorageDetails(
        public_url="",
        region_name="",
        endpoint_url="",
        aws_access_key_id="",
        aws_secret_access_key="",
        image_directory="",
    )
    names = [
        "public_url",
        "region_name",
        "endpoint_url",
        "aws_access_key_id",
        "aws_secret_access_key",
        "image_directory",
    ]
    assert validate_storage(nothing) == [required(name) for name in names]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"public_url": "ftp://cdn.example.com"}, Reason.INVALID_URL),
        ({"public_url": "cdn.example.com"}, Reason.INVALID_URL),
        ({"public_url": "https://me:pw@cdn.example.com"}, Reason.INVALID_URL),
        ({"public_url": "https://cdn.example.com/#x"}, Reason.INVALID_URL),
        ({"endpoint_url": "s3://bucket"}, Reason.INVALID_URL),
        ({"endpoint_url": "https://s3.example.com/?x=1"}, Reason.INVALID_URL),
        ({"image_directory": "a/../b"}, Reason.INVALID_FORMAT),
        ({"bucket": ".."}, Reason.INVALID_FORMAT),
        ({"region_name": "eu\nx"}, Reason.INVALID_FORMAT),
        ({"bucket": "\x00"}, Reason.INVALID_FORMAT),
        ({"aws_secret_access_key": "x" * 1025}, Reason.TOO_LONG),
    ],
)
def test_a_broken_rule_is_reported(changes: dict[str, str], reason: Reason) -> None:
    (violation,) = validate_storage(replace(GOOD, **changes))
    assert (violation.field, violation.reason) == (next(iter(changes)), reason)
    assert validate_storage(GOOD) == []


def test_details_show_no_secret_when_they_are_printed() -> None:
    assert "EXAMPLE" not in f"{GOOD!r} {GOOD}"


def test_the_first_key_seals_and_all_keys_open() -> None:
    old, new = new_key(), new_key()
    sealed = Vault(old).seal(b"secret")
    both = Vault(f" {new} , {old}")
    assert both.open(sealed) == b"secret"
    assert not both.is_current(sealed)
    assert both.is_current(both.seal(b"x"))
    assert Fernet(new).decrypt(both.seal(b"x")) == b"x"
    for stranger in (Vault(new), Vault("")):
        with pytest.raises(SealBrokenError):
            stranger.open(sealed)


@pytest.mark.parametrize(
    "keys", ["short", f"{new_key()},x", "ä"], ids=["short", "second", "letter"]
)
def test_a_malformed_key_is_reported_and_not_repeated(keys: str) -> None:
    with pytest.raises(SettingsError, match="IMG2IMG_STORAGE_KEYS: every key") as caught:
        Vault(keys)
    assert keys not in str(caught.value)
