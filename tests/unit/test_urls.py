"""URLs of callers are split without changing a byte that URLs may contain."""

from __future__ import annotations

import pytest

from img2img_server.domain.urls import HttpUrl, UrlError, is_http_url, join_url, parse_url


@pytest.mark.parametrize(
    "target",
    [
        "/a%28b%29.png",
        "/%3a%3A%2f%2F%7e%7E%41%61",
        "/a?",
        "/a?b",
        "/a?b?c",
        "/?",
        "/a//b///",
        "/a/./b/../c",
        "/a/%2e%2E/c",
        "/a;x=1;y=2?c;d",
        "/a+b?c+d&e=%2B",
        "/a%zz%%4?%",
        "/!$&'()*+,;=:@-._~|?!$&'()*+,;=:@-._~/?|^`{}[]",
        "/a?b\\c",
        "/[a]",
    ],
)
def test_what_a_url_may_have_stays_as_it_is(target: str) -> None:
    assert parse_url(f"https://example.org{target}").target == target
    assert parse_url(f"https://example.org{target}#a?b/c").target == target


@pytest.mark.parametrize(
    ("sent", "target"),
    [
        ("", "/"),
        ("?a", "/?a"),
        ("#a", "/"),
        ("/a b", "/a%20b"),
        ("/a?b c", "/a?b%20c"),
        ('/"<>^`{}', "/%22%3C%3E%5E%60%7B%7D"),
        ('/?"<>', "/?%22%3C%3E"),
        ("/ü?ü", "/%C3%BC?%C3%BC"),
        ("/漢😀", "/%E6%BC%A2%F0%9F%98%80"),
        ("/\u0085", "/%C2%85"),
        ("/e\u0301", "/e%CC%81"),
    ],
)
def test_what_a_url_must_not_have_is_encoded_as_browsers_do(sent: str, target: str) -> None:
    assert parse_url(f"https://example.org{sent}").target == target


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("HTTPS://Example.ORG", HttpUrl("https", "example.org", False, None, "/")),
        ("http://example.org:80/", HttpUrl("http", "example.org", False, None, "/")),
        ("https://example.org:80/", HttpUrl("https", "example.org", False, 80, "/")),
        ("https://example.org:/", HttpUrl("https", "example.org", False, None, "/")),
        ("https://example.org:0008443/", HttpUrl("https", "example.org", False, 8443, "/")),
        ("https://example.org./", HttpUrl("https", "example.org.", False, None, "/")),
        ("http://[2001:DB8::1]:81/", HttpUrl("http", "2001:db8::1", True, 81, "/")),
        (" \t\nhttp://a_b.example/ \r\n", HttpUrl("http", "a_b.example", False, None, "/")),
        ("https://bücher.example/", HttpUrl("https", "bücher.example", False, None, "/")),
    ],
)
def test_scheme_host_and_port_are_read(text: str, wanted: HttpUrl) -> None:
    assert parse_url(text) == wanted


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "does not begin with http:// or https://"),
        ("//example.org", "does not begin with http:// or https://"),
        ("ftp://example.org", "does not begin with http:// or https://"),
        ("http\u017f://example.org", "does not begin with http:// or https://"),
        ("https:example.org", "does not begin with http:// or https://"),
        ("C:\\a.png", "does not begin with http:// or https://"),
        ("iVBORw0KGgo" * 400, "does not begin with http:// or https://"),
        ("https://", "has no host"),
        ("https:///a", "has no host"),
        ("https://:8443/", "has no host"),
        ("https://user@example.org/", "contains a user name or password (user@host), which is not"),
        ("https://@example.org/", "contains a user name or password"),
        ("https://example.org:65536/", "has a port that is not between 1 and 65535"),
        ("https://example.org:0/", "has a port that is not between 1 and 65535"),
        ("https://example.org:x/", "has a host or port that is not well formed"),
        ("https://example.org:٣/", "has a host or port that is not well formed"),
        ("https://exa mple.org/", "has a host name that is not well formed"),
        ("https://a%2eb/", "has a host name that is not well formed"),
        ("https://[127.0.0.1]/", "has a host that is not well formed"),
        ("https://[::1/", "has a host or port that is not well formed"),
        ("https://example.org/a\\b", "contains a backslash"),
        ("https://example.org/a\tb", "contains a control character"),
        ("https://example.org/a\r\nb", "contains a control character"),
        ("https://example.org/\x7f", "contains a control character"),
        ("https://example.org/\ud800", "contains a character that is not Unicode text"),
        ("https://example.org/" + "a" * 4096, "is longer than 4096 characters"),
    ],
)
def test_a_url_that_cannot_be_requested_is_refused_with_its_cause(text: str, cause: str) -> None:
    with pytest.raises(UrlError, match="^" + cause.replace("(", r"\(").replace(")", r"\)")):
        parse_url(text)
    assert not is_http_url(text)


# RFC 3986, sections 5.4.1 and 5.4.2, without the base's fragment parameters and other schemes.
@pytest.mark.parametrize(
    ("reference", "target"),
    [
        ("g", "/b/c/g"),
        ("./g", "/b/c/g"),
        ("g/", "/b/c/g/"),
        ("/g", "/g"),
        ("?y", "/b/c/d;p?y"),
        ("g?y", "/b/c/g?y"),
        ("#s", "/b/c/d;p?q"),
        ("g#s", "/b/c/g"),
        ("g?y#s", "/b/c/g?y"),
        (";x", "/b/c/;x"),
        ("g;x?y#s", "/b/c/g;x?y"),
        (".", "/b/c/"),
        ("./", "/b/c/"),
        ("..", "/b/"),
        ("../", "/b/"),
        ("../g", "/b/g"),
        ("../..", "/"),
        ("../../", "/"),
        ("../../g", "/g"),
        ("../../../g", "/g"),
        ("/./g", "/g"),
        ("/../g", "/g"),
        ("g.", "/b/c/g."),
        (".g", "/b/c/.g"),
        ("..g", "/b/c/..g"),
        ("./../g", "/b/g"),
        ("./g/.", "/b/c/g/"),
        ("g/../h", "/b/c/h"),
        ("g;x=1/./y", "/b/c/g;x=1/y"),
        ("g?y/../x", "/b/c/g?y/../x"),
        ("g#s/../x", "/b/c/g"),
        # In addition to the RFC's list: bytes are unchanged, and so is an empty query.
        ("?", "/b/c/d;p?"),
        ("g?", "/b/c/g?"),
        ("%2e%2E/%28", "/b/c/%2e%2E/%28"),
        ("//a/b/../c%2f?", "/b/../c%2f?"),
        ("http://a/b/../c%2f?", "/b/../c%2f?"),
        ("/a b", "/a%20b"),
        ("/\udcfc", "/%FC"),
        ("/ü", "/%C3%BC"),
    ],
)
def test_a_reference_is_resolved_as_rfc_3986_says(reference: str, target: str) -> None:
    assert join_url(parse_url("http://a/b/c/d;p?q"), reference) == parse_url("http://a" + target)


@pytest.mark.parametrize(
    "reference", ["", " ", "ftp://a/", "http:g", "mailto:a", "///a", "//", "/\\a", "//b@c/", "/\tg"]
)
def test_a_reference_to_something_else_is_refused(reference: str) -> None:
    with pytest.raises(UrlError):
        join_url(parse_url("http://a/b/c/d;p?q"), reference)
