"""Reads a request's body as multipart/form-data, in memory and within the limits of bodies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.http_request import read_body

MEDIA_TYPE: Final = "multipart/form-data"
MAX_PARTS: Final = 100
# The limits of python-multipart.
_MAX_BOUNDARY_BYTES: Final = 256
_MAX_HEADERS: Final = 8  # of a part
_MAX_HEADER_BYTES: Final = 4096 + 128
_MAX_HEAD_BYTES: Final = _MAX_HEADERS * (_MAX_HEADER_BYTES + 2) + 4
_HEADER: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*)", re.DOTALL)
_NO_BOUNDARY: Final = (
    "Content-Type has no boundary of 1 to 256 bytes; let the HTTP library set Content-Type"
)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a form.

    Attributes:
        name: Name of the field.
        is_file: Whether the part has a file name.
        content: The bytes of the part, which belong to it alone.
    """

    name: str
    is_file: bool
    content: bytes

    def text(self) -> str:
        """Returns the content as text. Raises ValueError if it is not UTF-8."""
        return self.content.decode()


async def read_form(request: Request) -> list[Part]:
    """Reads the parts of the body, in their order.

    Raises:
        RequestError: INVALID_JSON with the reason INVALID_FORM if the body is not such a form, and
            the errors of `read_body`.
        ClientDisconnect: the client closed the connection.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    body = await read_body(request)
    return parse_form(body, options.get(b"boundary", b""))


def parse_form(body: bytearray, boundary: bytes) -> list[Part]:
    """Returns the parts of a form. Raises RequestError.

    The work for each byte is done by `re` and `bytes`: the parser of python-multipart handles some
    bytes one by one in Python, and 32 MiB of them would keep the event loop busy for seconds.
    """
    if not 0 < len(boundary) <= _MAX_BOUNDARY_BYTES:
        raise _invalid_form(_NO_BOUNDARY)
    limit = rb"--" + re.escape(boundary) + rb"(--|[ \t]*\r\n)"
    between = re.compile(rb"\r\n" + limit)
    found = re.match(rb"[\r\n]*" + limit, body) or between.search(body)
    parts: list[Part] = []
    if not found:
        raise _invalid_form("it has no line with the boundary of Content-Type")
    while found[1] != b"--":
        number = len(parts) + 1
        if number > MAX_PARTS:
            raise _invalid_form(f"it has more than {MAX_PARTS} parts")
        # The line break before the headers also ends them if there are none.
        head_begin = found.end() - 2
        head_end = body.find(b"\r\n\r\n", head_begin, head_begin + _MAX_HEAD_BYTES)
        if head_end < 0:
            raise _invalid_form(f"part {number} has no empty line after its headers")
        if not (found := between.search(body, head_end + 4)):
            raise _invalid_form(f"part {number} does not end with the boundary")
        name, is_file = _disposition(bytes(body[head_begin + 2 : head_end]), number)
        with memoryview(body) as view:
            content = bytes(view[head_end + 4 : found.start()])
        parts.append(Part(name, is_file, content))
    return parts


def _invalid_form(fault: str) -> RequestError:
    """Returns the error for a body that is not a valid form."""
    message = f"The body is not valid {MEDIA_TYPE}: {fault}"
    return RequestError(ErrorKind.INVALID_JSON, message, reason="INVALID_FORM")


def _disposition(head: bytes, number: int) -> tuple[str, bool]:
    """Returns the name of a part from its headers, and whether it has a file name."""
    values = {}
    lines = head.split(b"\r\n")
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None or len(lines) > _MAX_HEADERS or len(line) > _MAX_HEADER_BYTES:
            raise _invalid_form(f"the headers of part {number} cannot be read")
        values[header[1].lower()] = header[2]
    # The parser of options reads Latin-1, and gives the bytes back.
    value = values.get(b"content-disposition", b"").decode("latin-1")
    kind, options = parse_options_header(value)
    if kind != b"form-data" or b"name" not in options:
        raise _invalid_form(f"part {number} has no Content-Disposition: form-data with a name")
    return options[b"name"].decode(errors="replace"), b"filename" in options
