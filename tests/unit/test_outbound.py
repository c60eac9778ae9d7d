"""The outbound policy alone: no test resolves a name or opens a connection."""

# ruff: noqa: RUF001 - characters that look alike are the point

from __future__ import annotations

from ipaddress import ip_address

import hostile_urls
import pytest
from yarl import URL

from img2img_server.outbound.networks import is_public
from img2img_server.outbound.policy import (
    ForbiddenAddressError,
    OutboundPolicy,
    shown,
    shown_origin,
)
from img2img_server.settings import SettingsError

PUBLIC_ONLY = OutboundPolicy.parse("")
LOCAL = OutboundPolicy.parse("127.0.0.0/8, ::1, localhost")


def test_the_corpus_is_large_and_holds_nothing_twice() -> None:
    assert len(hostile_urls.ALL) >= 200
    assert len(set(hostile_urls.ALL)) == len(hostile_urls.ALL)


@pytest.mark.parametrize("url", hostile_urls.WITHOUT_RESOLVING)
def test_a_hostile_address_is_refused_before_any_name_is_resolved(url: str) -> None:
    with pytest.raises(ForbiddenAddressError):
        PUBLIC_ONLY.check_url(url.replace("PORT", "8080"))


@pytest.mark.parametrize("url", hostile_urls.NAMES)
def test_a_well_formed_name_waits_for_its_addresses(url: str) -> None:
    host = PUBLIC_ONLY.check_url(url.replace("PORT", "8080")).raw_host
    assert host is not None

    for address in hostile_urls.FORBIDDEN_ADDRESSES:
        with pytest.raises(ForbiddenAddressError, match="is not public"):
            PUBLIC_ONLY.check_addresses(host, [ip_address("8.8.8.8"), ip_address(address)])


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "http://example.com/a.png",
        "https://example.com",
        "https://example.com./a.png",
        "https://example.com:443/a.png",
        "https://example.com:8443/a.png",
        "http://example.com:65535/",
        "HTTPS://EXAMPLE.COM/A.PNG",
        "https://bücher.example/ü.png",
        "https://xn--bcher-kva.example/",
        "https://a_b.example.com/",
        "https://bucket.s3.eu-west-1.amazonaws.com/k?X-Amz-Signature=a%2Bb%3D&X-Amz-Date=2",
        "https://example.com/@user/picture.png",
        "https://example.com/?next=http://127.0.0.1/",
        "https://example.com/a.png#@127.0.0.1",
        "https://1.1.1.1/",
        "https://93.184.215.14:8080/a.png",
        "http://172.15.255.255/",
        "http://172.32.0.1/",
        "http://100.128.0.1/",
        "http://[2606:4700:4700::1111]/",
        "https://[2a00:1450:4001::200e]:8443/a.png",
        "http://[64:ff9b::8.8.8.8]/",
        "https://3com.example/",
        "https://0xdeadbeef.example/",
    ],
)
def test_an_ordinary_public_address_is_allowed(url: str) -> None:
    assert PUBLIC_ONLY.check_url(url).raw_host


def test_the_url_that_is_checked_is_the_url_that_is_requested() -> None:
    url = PUBLIC_ONLY.check_url("https://Bücher.example:8443/ä b%28?q=1%2b1&k=%7E#part")

    assert str(url) == "https://xn--bcher-kva.example:8443/%C3%A4%20b%28?q=1%2b1&k=%7E"
    assert url.raw_host == "xn--bcher-kva.example"


@pytest.mark.parametrize(
    ("host", "sent"),
    [
        ("faß.example", "xn--fa-hia.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("bücher。example", "xn--bcher-kva.example"),
        ("ＥＸＡＭＰＬＥ.test", "example.test"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        ("i❤.example", "xn--i-7iq.example"),
        ("r3---sn-ab.example.", "r3---sn-ab.example."),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
    ],
)
def test_an_international_host_name_is_converted_as_browsers_do(host: str, sent: str) -> None:
    assert PUBLIC_ONLY.check_url(f"https://{host}/").raw_host == sent


@pytest.mark.parametrize("host", ["a℀b.example", "\u00ad", "a／b.example", "a＠b.example", "ſ：1"])
def test_a_host_name_that_becomes_something_else_is_refused(host: str) -> None:
    with pytest.raises(ForbiddenAddressError):
        PUBLIC_ONLY.check_url(f"https://{host}/")


@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ("/b.png", "https://example.com/b.png"),
        ("b.png?x=1", "https://example.com/folder/b.png?x=1"),
        ("../b.png", "https://example.com/b.png"),
        ("//cdn.example.net/b.png", "https://cdn.example.net/b.png"),
        ("http://cdn.example.net/b.png", "http://cdn.example.net/b.png"),
        ("?v=2", "https://example.com/folder/a.png?v=2"),
    ],
)
def test_a_redirect_is_resolved_against_its_page(reference: str, target: str) -> None:
    base = URL("https://example.com/folder/a.png")

    assert str(PUBLIC_ONLY.check_url(reference, base=base)) == target


@pytest.mark.parametrize(
    "reference",
    [
        "//127.0.0.1/",
        "//user@example.net/",
        "//@example.net/",
        "\\\\127.0.0.1\\",
        "/\\127.0.0.1/",
        "file:///etc/passwd",
        "http:///etc/passwd",
        "gopher://example.net/",
        "http://[::1",
        "//[::1]/",
        "//0x7f.1/",
        "javascript:alert(1)",
        "data:,x",
        "/a\r\nb",
    ],
)
def test_a_hostile_redirect_is_refused(reference: str) -> None:
    with pytest.raises(ForbiddenAddressError):
        PUBLIC_ONLY.check_url(reference, base=URL("https://example.com/folder/a.png"))


def test_a_listed_host_may_have_any_address_and_port() -> None:
    policy = OutboundPolicy.parse("Files.Internal., 10.2.0.0/16")

    for text in ("http://files.internal:81/", "http://FILES.internal./a"):
        url = policy.check_url(text)
        assert policy.lists(url)
        policy.check_addresses(url.raw_host or "", [ip_address("10.9.9.9"), ip_address("::1")])
    for host in ("other.internal", "xfiles.internal", "a.files.internal", "files.internal.test"):
        assert not policy.lists(URL(f"http://{host}/"))
        with pytest.raises(ForbiddenAddressError):
            policy.check_addresses(host, [ip_address("10.9.9.9")])


def test_a_listed_network_holds_for_addresses_and_for_names_that_have_them() -> None:
    policy = OutboundPolicy.parse("10.2.0.0/16")

    assert policy.lists(policy.check_url("http://10.2.3.4:22/"))
    policy.check_addresses("anything.test", [ip_address("10.2.3.4"), ip_address("8.8.8.8")])
    for text in ("http://10.3.0.1/", "http://[::ffff:10.2.3.4]/", "http://10.131844/"):
        with pytest.raises(ForbiddenAddressError):
            policy.check_url(text)


def test_what_local_mode_lists_allows_loopback_and_nothing_else() -> None:
    for text in (
        "http://127.0.0.1:81/",
        "http://[::1]:9/",
        "http://localhost:8333/",
        "http://127.9.9.9/",
    ):
        assert LOCAL.lists(LOCAL.check_url(text))
    for text in ("http://10.0.0.1/", "http://169.254.169.254/", "http://127.1/", "http://0.0.0.0/"):
        with pytest.raises(ForbiddenAddressError):
            LOCAL.check_url(text)


def test_a_public_host_is_not_listed() -> None:
    assert not LOCAL.lists(LOCAL.check_url("https://example.com/hook"))
    assert not LOCAL.lists(LOCAL.check_url("https://1.1.1.1/hook"))


@pytest.mark.parametrize(
    "text", ["10.2.0.1/16", "300.1.1.1", "a b", "host:80", "http://x", "*.x", "127.1"]
)
def test_a_wrong_entry_of_the_list_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="IMG2IMG_OUTBOUND_ALLOW") as caught:
        OutboundPolicy.parse(f"localhost, {text}")

    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["", " ", ",", " , ,", "none", " None "])
def test_an_empty_list_lists_nothing(text: str) -> None:
    assert OutboundPolicy.parse(text) == OutboundPolicy()


@pytest.mark.parametrize("address", hostile_urls.FORBIDDEN_ADDRESSES)
def test_a_special_address_is_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "1.0.0.1",
        "8.8.8.8",
        "126.255.255.255",
        "128.0.0.1",
        "168.63.129.15",
        "223.255.255.255",
        "2606:4700::1111",
        "2001:4860:4860::8888",
        "2a01::1",
        "64:ff9b::808:808",
        "3ffe::1",
    ],
)
def test_an_ordinary_address_is_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:pw@example.com:8443/a/b.png?token=1#x", "https://example.com:8443/a/b.png"),
        ("https://example.com", "https://example.com"),
        ("http://[::1", "malformed"),
        ("http://a\\@b/", "malformed"),
        ("https:\\\\user:pw@example.com/", "malformed"),
        (" https://example.com/a b", "https://example.com/a%20b"),
    ],
)
def test_logs_show_no_query_and_no_user_part(url: str, expected: str) -> None:
    assert shown(url) == expected


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://hooks.slack.com/services/T0/B0/secret", "https://hooks.slack.com"),
        ("https://user:secret@example.com:8443/secret?secret#secret", "https://example.com:8443"),
        ("secret", "malformed"),
        ("https:///secret", "malformed"),
        ("http://[::1", "malformed"),
    ],
)
def test_logs_show_only_the_origin_of_a_webhook(url: str, expected: str) -> None:
    assert shown_origin(url) == expected
