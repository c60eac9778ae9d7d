"""How the gateway reads multipart/form-data."""

from __future__ import annotations

import time

import httpx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.forms import MAX_PARTS, Part, parse_form
from img2img_server.gateway.http.http_request import MAX_BODY_BYTES

BOUNDARY = b"limit"


def form(*parts: bytes, end: bytes = b"--limit--\r\n") -> bytearray:
    return bytearray(b"".join(b"--limit\r\n" + part + b"\r\n" for part in parts) + end)


def part(name: str, content: bytes, more: str = "") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + content


def test_a_form_of_httpx_is_read_as_it_was_sent() -> None:
    content = bytes(range(256)) * 50 + b"\r\n--limi\r\n"
    request = httpx.Request(
        "POST",
        "http://img.example.com",
        data={"prompt": "Häuser am Meer", "n": "2"},
        files={"image[]": ("a.png", content, "image/png")},
        headers={"Content-Type": "multipart/form-data; boundary=limit"},
    )
    assert parse_form(bytearray(request.read()), BOUNDARY) == [
        Part("prompt", False, "Häuser am Meer".encode()),
        Part("n", False, b"2"),
        Part("image[]", True, content),
    ]


def test_headers_of_parts_are_read_in_any_case_and_order() -> None:
    sent = b'content-type: text/plain\r\nCONTENT-DISPOSITION: form-data; name="n"\r\n\r\n1'
    assert parse_form(form(sent), BOUNDARY) == [Part("n", False, b"1")]


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n" + form(part("n", b"1")),
        b"for old clients\r\n" + form(part("n", b"1")),
        form(part("n", b"1")).replace(b"--limit\r\n", b"--limit \t\r\n"),
        form(part("n", b"1"), end=b"--limit--more"),
    ],
    ids=["a line break before", "text before", "spaces behind a boundary", "text behind"],
)
def test_what_the_standard_allows_around_parts_is_ignored(sent: bytes) -> None:
    assert parse_form(bytearray(sent), BOUNDARY) == [Part("n", False, b"1")]


@given(
    contents=st.lists(
        st.lists(
            st.sampled_from([b"\r\n", b"--", b"limi", b"--limit", b"-", b"a", b"\r", b"\n", b"\0"])
        ).map(b"".join),
        min_size=1,
        max_size=4,
    )
)
def test_any_content_without_the_boundary_is_read_as_it_was_sent(contents: list[bytes]) -> None:
    assume(not any(b"\r\n--limit" in b"\r\n" + content for content in contents))
    request = httpx.Request(
        "POST",
        "http://img.example.com",
        files=[("a", ("b", content)) for content in contents],
        headers={"Content-Type": "multipart/form-data; boundary=limit"},
    )
    assert parse_form(bytearray(request.read()), BOUNDARY) == [
        Part("a", True, content) for content in contents
    ]


@pytest.mark.parametrize(
    ("start", "repeated"),
    [
        (b"--limit", b" "),
        (b"", b"\r\n"),
        (form(part("n", b""), end=b""), b"\r\n--limi"),
        (form(part("n", b""), end=b""), b"\r\n--limit "),
        (b"--limit\r\n", b"a"),
        (b"--limit\r\n", b"A: b\r\n"),
    ],
    ids=["padding", "lines", "almost boundaries", "padded text", "no head", "headers"],
)
def test_the_largest_body_takes_a_fraction_of_a_second(start: bytes, repeated: bytes) -> None:
    body = bytearray(start + repeated * (MAX_BODY_BYTES // len(repeated)))
    begin = time.thread_time()
    with pytest.raises(RequestError):
        parse_form(body, BOUNDARY)
    assert time.thread_time() - begin < 1.0  # Byte by byte in Python, it takes 4 to 11 s.


def test_an_empty_form_has_no_parts() -> None:
    assert parse_form(form(part("n", b"")), BOUNDARY) == [Part("n", False, b"")]


@pytest.mark.parametrize(
    ("body", "boundary", "fault"),
    [
        (form(part("n", b"1")), b"", "Content-Type has no boundary"),
        (form(part("n", b"1")), b"another", "no line with the boundary"),
        (form(part("n", b"1")), b"x" * 300, "Content-Type has no boundary of 1 to 256 bytes"),
        (form(part("n", b"1"), end=b""), BOUNDARY, "part 1 does not end with the boundary"),
        (form(part("n", b"1"), end=b"--lim"), BOUNDARY, "part 1 does not end"),
        (form(b"\r\n1"), BOUNDARY, "part 1"),
        (form(b"Content-Disposition: attachment\r\n\r\n1"), BOUNDARY, "form-data with a name"),
        (form(b"Content-Disposition: form-data\r\n\r\n1"), BOUNDARY, "form-data with a name"),
        (
            form(b'A b: c\r\nContent-Disposition: form-data; name="n"\r\n\r\n1'),
            BOUNDARY,
            "the headers of part 1",
        ),
        (form(b"A: b\r\n" * 8 + part("n", b"1")), BOUNDARY, "the headers of part 1"),
        (
            form(b"A: " + b"b" * 5000 + b"\r\n" + part("n", b"1")),
            BOUNDARY,
            "the headers of part 1",
        ),
        (bytearray(b"{}"), BOUNDARY, "no line with the boundary"),
        (bytearray(), BOUNDARY, "no line with the boundary"),
    ],
    ids=[
        "no boundary",
        "another boundary",
        "a long boundary",
        "no end",
        "half an end",
        "no headers",
        "no form data",
        "no name",
        "no header name",
        "nine headers",
        "a long header",
        "JSON",
        "nothing",
    ],
)
def test_any_other_body_is_rejected(body: bytearray, boundary: bytes, fault: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_form(body, boundary)
    assert (caught.value.kind, caught.value.reason) == (ErrorKind.INVALID_JSON, "INVALID_FORM")
    assert fault in caught.value.message


def test_a_form_has_a_largest_number_of_parts() -> None:
    assert len(parse_form(form(*[part("n", b"1")] * MAX_PARTS), BOUNDARY)) == MAX_PARTS
    with pytest.raises(RequestError, match="it has more than 100 parts"):
        parse_form(form(*[part("n", b"1")] * (MAX_PARTS + 1)), BOUNDARY)
