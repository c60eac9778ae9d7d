"""URLs are sent byte for byte, and characters that must be encoded are encoded as by httpx."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Mapping
from urllib.parse import urljoin

import httpx
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from web_peers import CDN, IMAGE, Names, answer, fetch, origin

from img2img_server.domain.urls import join_url, parse_url
from img2img_server.outbound.policy import ForbiddenAddressError, OutboundPolicy
from img2img_server.webhooks.sender import webhook_sender

# Characters that RFC 3986 allows in a path, including percent-encodings with digits in both cases.
HEX = st.sampled_from(string.hexdigits)
ENCODED = st.builds("%{}{}".format, HEX, HEX)
PLAIN = st.sampled_from(string.ascii_letters + string.digits + "-._~!$&'()*+,;=:@/")
PATHS = st.lists(st.one_of(PLAIN, ENCODED)).map("".join)
QUERIES = st.lists(st.one_of(PLAIN, ENCODED, st.just("?"))).map("".join)
TARGETS = st.one_of(
    PATHS.map("/{}".format), st.builds("/{}?{}".format, PATHS, QUERIES), st.just("/?")
)


@settings(max_examples=60)
@given(TARGETS, TARGETS)
@example("/a%28b%29.png?X-Sig=%2f%3a", "/?")
@example("/a/../b/./%2e%2e//", "//a/../b?c?")
def test_init_images_and_redirects_are_requested_byte_for_byte(first: str, second: str) -> None:
    assume(not second.startswith("//"))  # The reference names another host.

    async def fetched() -> list[str]:
        async with origin(answer(302), answer(200, IMAGE)) as server:
            absolute = f"http://cdn.test:{server.port}{second}"
            server.answers[0] = answer(302, b"", f"Location: {absolute}")
            await fetch(f"http://cdn.test:{server.port}{first}#x", CDN, Names("127.0.0.1"))
            return server.targets

    assert asyncio.run(fetched()) == [f"{first} HTTP/1.1", f"{second} HTTP/1.1"]


@settings(max_examples=30)
@given(TARGETS)
def test_webhooks_are_posted_to_the_address_byte_for_byte(target: str) -> None:
    async def posted() -> list[str]:
        names = Names("127.0.0.1")
        post = webhook_sender(CDN, resolver=names)
        async with origin(answer(204)) as server:
            headers: Mapping[str, str] = {}
            outcome = await post(f"http://cdn.test:{server.port}{target}", b"{}", headers)
            assert outcome.delivered
            return server.targets

    assert asyncio.run(posted()) == [f"{target} HTTP/1.1"]


# httpx follows WHATWG except for a circumflex in a path and an apostrophe in a query. It also
# removes dot segments and encodes a percent sign that encodes nothing.
OTHER = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\#?%^'")


@given(st.text(OTHER), st.none() | st.text(OTHER))
def test_other_characters_are_encoded_as_httpx_encodes_them(path: str, query: str | None) -> None:
    assume(not any(part in (".", "..") for part in path.split("/")))
    text = f"https://example.org/{path}" + ("" if query is None else f"?{query}")
    assume(text == text.strip())
    wanted = httpx.URL(text).raw_path.decode()
    assert parse_url(text).target == wanted


@given(st.text(), st.sampled_from(["https://example.org/", "https://", "//", "/", "", "http://["]))
def test_a_url_is_read_the_same_again_or_refused(text: str, start: str) -> None:
    policy = OutboundPolicy()
    try:
        url = policy.check_url(start + text)
    except ForbiddenAddressError:
        return
    assert str(url).isascii()
    assert str(policy.check_url(str(url))) == str(url)
    assert httpx.URL(str(url)).raw_host.decode() == (url.raw_host or "")


# urljoin drops empty segments and empty queries, so there are none.
SEGMENTS = st.lists(st.sampled_from(["a", "b;c", "%2f", "%7E", ".", "..", "..."]), min_size=1)
REFERENCES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "/"]),
    SEGMENTS.map("/".join),
    st.sampled_from(["", "/", "?q=%2f", "?/../"]),
)


@given(SEGMENTS.map("/".join), REFERENCES)
def test_a_reference_is_joined_as_urljoin_joins_it(base: str, reference: str) -> None:
    page = f"https://example.org/{base}?q"
    wanted = urljoin(page, reference).removeprefix("https://example.org")
    assert join_url(parse_url(page), reference).target == (wanted or "/")


@pytest.mark.parametrize("host", ["example.org", "EXAMPLE.org.", "bücher.example", "[2001:db8::1]"])
def test_the_host_is_the_one_that_httpx_sees(host: str) -> None:
    assert parse_url(f"https://{host}/").host == httpx.URL(f"https://{host}/").host
