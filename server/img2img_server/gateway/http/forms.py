"""Reads a request's body as multipart/form-data, in memory and within the limits of bodies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.http_request import read_body

MEDIA_TYPE: Final = "multipart/form-data"
MAX_PARTS: Final = 100
_INVALID: Final = "The body is not valid multipart/form-data"
_TOO_MANY: Final = f"The form must not have more than {MAX_PARTS} parts"


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
    """Returns the parts of a form. Raises RequestError."""
    reader = _Reader()
    try:
        parser = MultipartParser(boundary or _no_boundary(), reader.callbacks())
        parser.write(body)  # type: ignore[arg-type]  # It slices what it is given.
    except FormParserError:
        raise invalid_form() from None
    if not reader.is_complete:
        raise invalid_form()
    return reader.parts


def invalid_form(message: str = _INVALID) -> RequestError:
    """Returns the error for a body that is not a valid form."""
    return RequestError(ErrorKind.INVALID_JSON, message, reason="INVALID_FORM")


def _no_boundary() -> bytes:
    raise FormParserError


@dataclass(slots=True)
class _Reader:
    """Collects the parts that the parser finds."""

    parts: list[Part] = field(default_factory=list)
    is_complete: bool = False
    _name: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _disposition: str = ""
    _content: list[bytes] = field(default_factory=list)

    def callbacks(self) -> Any:
        """Returns the callbacks of the parser."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._extend_name,
            "on_header_value": self._extend_value,
            "on_header_end": self._end_header,
            "on_part_data": self._extend_content,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        if len(self.parts) >= MAX_PARTS:
            raise invalid_form(_TOO_MANY)
        self._disposition = ""
        self._content = []

    def _extend_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _extend_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            # The parser of options reads Latin-1, and gives the bytes back.
            self._disposition = self._value.decode("latin-1")
        self._name.clear()
        self._value.clear()

    def _extend_content(self, data: bytes, start: int, end: int) -> None:
        with memoryview(data) as view:
            self._content.append(bytes(view[start:end]))

    def _end_part(self) -> None:
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or b"name" not in options:
            raise invalid_form()
        name = options[b"name"].decode(errors="replace")
        self.parts.append(Part(name, b"filename" in options, b"".join(self._content)))
        self._content = []

    def _end(self) -> None:
        self.is_complete = True
