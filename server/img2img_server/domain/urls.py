"""Splits http and https URLs that callers supply into what a request needs.

One parser for every such URL: the policy check, the connection and the request line all use its
result. The path and the query keep the caller's bytes, since many of these URLs are signed:
percent-encodings, the case of their digits, dot segments and an empty query stay as they are. Only
characters that a URL must not contain are encoded, as browsers do (WHATWG URL, section 1.3).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

URL_MAX_CHARACTERS = 4096
MAX_PORT = 65_535

_HTTP_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?", re.I | re.S | re.A)
_REFERENCE = re.compile(r"([^?#]*)(\?[^#]*)?(?:#.*)?", re.S)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.I | re.A)
_HOST_AND_PORT = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::([0-9]*))?")
_WHITE_SPACE = " \t\r\n\f"
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_BACKSLASH = re.compile(r"[^?#]*\\")
# WHATWG's path and special-query percent-encode sets without controls, "#" and the apostrophe:
# RFC 3986 allows the apostrophe, so a signature may cover it.
_NOT_IN_PATH = re.compile(rb"""[ "<>^`{}\x80-\xff]""")
_NOT_IN_QUERY = re.compile(rb"""[ "<>\x80-\xff]""")

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
HOST_NAME = re.compile(rf"(?=.{{1,254}}$){_LABEL}(?:\.{_LABEL})*\.?")
SCHEME_PORTS = {"http": 80, "https": 443}


class UrlError(ValueError):
    """The text is not a URL that can be requested. The message is a predicate with the reason, to
    which callers add a subject.
    """


class NotHttpError(UrlError):
    """The text does not begin like an http or https URL."""

    def __init__(self) -> None:
        super().__init__("does not begin with http:// or https://")


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """The parts of an http or https URL.

    Attributes:
        scheme: "http" or "https".
        host: Name or address in lower case, without brackets; of an international name the
            Unicode form that the caller sent.
        is_ipv6: The host was in brackets.
        port: The port that the URL names; None when it names none, or the scheme's own.
        target: Path and query as the request line has them: ASCII, beginning with a slash.
    """

    scheme: str
    host: str
    is_ipv6: bool
    port: int | None
    target: str


def parse_url(text: str) -> HttpUrl:
    """Parses an absolute URL. White space around it is dropped, its fragment too.

    Raises:
        UrlError: it is too long, has no host, a user part, or characters that no URL may have.
    """
    text = text.strip(_WHITE_SPACE)
    found = _HTTP_URL.fullmatch(text)
    if found is None:
        raise NotHttpError
    _check(text)
    scheme, authority, path, query = found[1].lower(), found[2], found[3], found[4] or ""
    host, is_ipv6, port = _host_and_port(authority)
    if port == SCHEME_PORTS[scheme]:
        port = None
    return HttpUrl(scheme, host, is_ipv6, port, (encode_path(path) or "/") + encode_query(query))


def join_url(base: HttpUrl, reference: str) -> HttpUrl:
    """Resolves a reference against the URL that it came from (RFC 3986, section 5.2.2).

    A reference with a host keeps its dot segments, as an absolute URL does.

    Args:
        reference: A `Location`; bytes that are not UTF-8 are surrogates (PEP 383).

    Raises:
        UrlError: as of parse_url, or the reference is empty.
    """
    reference = reference.strip(_WHITE_SPACE)
    _check(reference)
    if not reference:
        raise UrlError("is empty")
    if _SCHEME.match(reference):
        return parse_url(reference)
    if reference.startswith("//"):
        return parse_url(f"{base.scheme}:{reference}")
    found = _REFERENCE.fullmatch(reference)
    assert found is not None  # The expression matches every text.
    path, query = encode_path(found[1]), encode_query(found[2] or "")
    base_path, mark, base_query = base.target.partition("?")
    if not path:
        return replace(base, target=base_path + (query or mark + base_query))
    if not path.startswith("/"):
        path = base_path[: base_path.rindex("/") + 1] + path
    return replace(base, target=_without_dot_segments(path) + query)


def is_http_url(text: str) -> bool:
    """Returns whether the text is an absolute http or https URL that can be requested."""
    try:
        parse_url(text)
    except UrlError:
        return False
    return True


def is_web_port(port: int | None) -> bool:
    """Returns whether HTTP may use the port: below 1024, only 80 and 443 are HTTP's."""
    return port is None or port in (80, 443) or port >= 1024


def _check(text: str) -> None:
    if len(text) > URL_MAX_CHARACTERS:
        raise UrlError(f"is longer than {URL_MAX_CHARACTERS} characters")
    if _CONTROL.search(text):
        raise UrlError("contains a control character")
    # Some parsers take a backslash for a slash and see another host than others.
    if _BACKSLASH.match(text):
        raise UrlError("contains a backslash")


def _host_and_port(authority: str) -> tuple[str, bool, int | None]:
    if "@" in authority:
        raise UrlError("contains a user name or password (user@host), which is not supported")
    found = _HOST_AND_PORT.fullmatch(authority)
    if found is None:
        raise UrlError("has a host or port that is not well formed")
    is_ipv6, port = found[1] is not None, int(found[3]) if found[3] else None
    host = (found[1] if is_ipv6 else found[2]).lower()
    if not host:
        raise UrlError("has no host")
    if port is not None and not 0 < port <= MAX_PORT:
        raise UrlError(f"has a port that is not between 1 and {MAX_PORT}")
    if is_ipv6 and ":" not in host:
        raise UrlError("has a host that is not well formed")
    if not is_ipv6 and host.isascii() and not HOST_NAME.fullmatch(host):
        raise UrlError("has a host name that is not well formed")
    return host, is_ipv6, port


def encode_path(text: str) -> str:
    """Encodes the characters that the path of a URL must not contain, and nothing else."""
    return _encoded(text, _NOT_IN_PATH)


def encode_query(text: str) -> str:
    """Encodes the characters that the query of a URL must not contain, and nothing else."""
    return _encoded(text, _NOT_IN_QUERY)


def _encoded(text: str, not_allowed: re.Pattern[bytes]) -> str:
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise UrlError("contains a character that is not Unicode text") from None
    return not_allowed.sub(lambda match: b"%%%02X" % match[0][0], data).decode("ascii")


def _without_dot_segments(path: str) -> str:
    """Removes dot segments of a path that begins with a slash (RFC 3986, section 5.2.4)."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
