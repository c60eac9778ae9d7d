"""IMG2IMG_NATS_URL and related settings: addresses, credentials and TLS."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import nats.errors
import nats.js.errors
import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img_server.errors import UnavailableError
from img2img_server.exit_reason import reasons_of
from img2img_server.nats.access import Login, NatsAccess
from img2img_server.nats.faults import unavailable
from img2img_server.settings import Settings, SettingsError

PRINTABLE = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF, exclude_categories=["Cs"]))


def access(url: str, **more: Any) -> NatsAccess:
    return NatsAccess.from_settings(Settings(nats_url=url, **more))


@pytest.mark.parametrize(
    ("url", "address", "login"),
    [
        ("nats://h", "nats://h:4222", Login()),
        ("h", "nats://h:4222", Login()),
        ("h:4333", "nats://h:4333", Login()),
        ("nats://h:4222/", "nats://h:4222", Login()),
        ("NATS://h", "nats://h:4222", Login()),
        ("nats://[::1]", "nats://[::1]:4222", Login()),
        ("nats://[::1]:4333", "nats://[::1]:4333", Login()),
        ("tls://u:p@h:1", "tls://h:1", Login("u", "p")),
        ("u:p@h", "nats://h:4222", Login("u", "p")),
        ("nats://token@h", "nats://h:4222", Login(token="token")),
        ("nats://to%2Fken%40@h", "nats://h:4222", Login(token="to/ken@")),
        ("nats://u:p@ss@h", "nats://h:4222", Login("u", "p@ss")),
        ("nats://u:100%@h", "nats://h:4222", Login("u", "100%")),
        ("nats://u:a+b@h", "nats://h:4222", Login("u", "a+b")),
        ("nats://u2:p%40ss%3Aw%2Frd@h", "nats://h:4222", Login("u2", "p@ss:w/rd")),
        ("nats://u:%C3%A9%23%3F@h", "nats://h:4222", Login("u", "é#?")),
        ("wss://h/nats", "wss://h/nats", Login()),
    ],
)
def test_a_server_is_read_with_its_credentials(url: str, address: str, login: Login) -> None:
    found = access(url)
    assert (found.servers, found.login) == ((address,), login)


@given(user=PRINTABLE, password=PRINTABLE)
def test_any_credentials_can_be_expressed_in_the_address(user: str, password: str) -> None:
    url = f"nats://{quote(user, safe='')}:{quote(password, safe='')}@h"
    assert access(url).login == Login(user, password)


def test_credentials_of_one_server_are_those_of_all() -> None:
    found = access(" nats://a:1%2F@north , nats://a:1%2F@south:4223,nats://east ")
    assert found.servers == ("nats://north:4222", "nats://south:4223", "nats://east:4222")
    assert found.login == Login("a", "1/")


def test_credentials_of_the_settings_hold_for_every_server() -> None:
    found = access("nats://north,nats://south", nats_user="u", nats_password="p@/#%41")
    assert found.login == Login("u", "p@/#%41")
    assert found.source == "IMG2IMG_NATS_PASSWORD"
    found = access("nats://north", nats_token="t")
    assert found.login == Login(token="t")
    assert found.source == "IMG2IMG_NATS_TOKEN"


@pytest.mark.parametrize(
    ("url", "more", "why"),
    [
        ("", {}, "no server"),
        (" , ", {}, "no server"),
        ("http://h", {}, "scheme"),
        ("nats://u:p/secret-1@h", {}, "%2F"),
        ("nats://u:p#secret-1@h", {}, "%23"),
        ("nats://u:p?secret-1@h", {}, "%3F"),
        ("nats://u:secret-1@h:port", {}, "no address"),
        ("nats://u:secret-1@", {}, "without a host"),
        ("nats://h/path", {}, "only user, password, host and port"),
        ("nats://h,wss://h", {}, "cannot be mixed"),
        ("ws://h", {"nats_ca_file": "ca.pem"}, "write wss://"),
        ("nats://u:secret-1@h", {"nats_token": "t"}, "not in both"),
        ("nats://u:secret-1@h,nats://u:p@i", {}, "the same credentials"),
    ],
)
def test_what_is_no_address_is_refused_without_showing_it(
    url: str, more: dict[str, Any], why: str
) -> None:
    with pytest.raises(SettingsError, match=why) as caught:
        access(url, **more)
    assert str(caught.value).startswith("IMG2IMG_NATS_URL: ")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"nats_user": "u"}, "IMG2IMG_NATS_PASSWORD: is not set"),
        ({"nats_password": "p"}, "IMG2IMG_NATS_USER: is not set"),
        ({"nats_user": "u", "nats_password": "p", "nats_token": "t"}, "cannot be used together"),
        ({"nats_cert_file": "a.pem"}, "IMG2IMG_NATS_KEY_FILE: is not set"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings(**more)


def test_tls_is_demanded_by_the_scheme_or_by_a_file() -> None:
    assert not access("nats://h").needs_tls
    assert access("tls://h").needs_tls
    assert access("nats://h", nats_ca_file="ca.pem").needs_tls


def test_secrets_do_not_show() -> None:
    shown = repr(access("nats://u:secret-1@h")) + repr(Login(token="secret-2"))
    assert "secret" not in shown


def test_a_certificate_file_that_is_missing_is_named_with_its_setting() -> None:
    with pytest.raises(SettingsError, match=r"IMG2IMG_NATS_CA_FILE: /nowhere/ca.pem"):
        _ = access("tls://h", nats_ca_file="/nowhere/ca.pem").tls


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (TimeoutError(), "TimeoutError"),
        (nats.errors.ConnectionClosedError(), "connection closed"),
        (nats.js.errors.ServiceUnavailableError(description="no quorum"), "no quorum"),
    ],
)
def test_an_operator_reads_why_nats_cannot_be_used_and_a_caller_does_not(
    error: Exception, why: str
) -> None:
    with pytest.raises(UnavailableError) as caught, unavailable():
        raise error
    (reason,) = reasons_of(caught.value)
    assert reason.startswith("IMG2IMG_NATS_URL: NATS cannot be used (")
    assert why in reason
    assert str(caught.value) == "the service is temporarily unavailable"
