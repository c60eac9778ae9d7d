"""How the gateway reads multipart/form-data."""

from __future__ import annotations

import httpx
import pytest

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.forms import MAX_PARTS, Part, parse_form

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


def test_an_empty_form_has_no_parts() -> None:
    assert parse_form(form(part("n", b"")), BOUNDARY) == [Part("n", False, b"")]


@pytest.mark.parametrize(
    ("body", "boundary"),
    [
        (form(part("n", b"1")), b""),
        (form(part("n", b"1")), b"another"),
        (form(part("n", b"1")), b"x" * 300),
        (form(part("n", b"1"), end=b""), BOUNDARY),
        (form(part("n", b"1"), end=b"--lim"), BOUNDARY),
        (form(b"\r\n1"), BOUNDARY),
        (form(b"Content-Disposition: attachment\r\n\r\n1"), BOUNDARY),
        (form(b"Content-Disposition: form-data\r\n\r\n1"), BOUNDARY),
        (bytearray(b"{}"), BOUNDARY),
        (bytearray(), BOUNDARY),
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
        "JSON",
        "nothing",
    ],
)
def test_any_other_body_is_rejected(body: bytearray, boundary: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_form(body, boundary)
    assert (caught.value.kind, caught.value.reason) == (ErrorKind.INVALID_JSON, "INVALID_FORM")


def test_a_form_has_a_largest_number_of_parts() -> None:
    assert len(parse_form(form(*[part("n", b"1")] * MAX_PARTS), BOUNDARY)) == MAX_PARTS
    with pytest.raises(RequestError, match="must not have more than 100 parts"):
        parse_form(form(*[part("n", b"1")] * (MAX_PARTS + 1)), BOUNDARY)
