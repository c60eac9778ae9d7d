"""Checks the text of settings. Reads no file and opens no connection.

Each function returns what is wrong, as the end of a sentence that begins with the setting's name,
and an empty string where nothing is. No function repeats the text: it may hold a password.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv6Address, ip_address
from typing import Final
from urllib.parse import urlsplit

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,254}}$){_LABEL}(?:\.{_LABEL})*\.?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_GRPC_SCHEME = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
# By the last word of a setting's name: 31 days, 10 years, what JSON holds exactly.
_MOST: Final = {"seconds": 2_678_400, "hours": 87_600, "bytes": 2**53}
# Of the minio client, which refuses other names.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-_:]{1,61}[A-Za-z0-9]")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+")


def fault_of(name: str, text: str) -> str:
    """Returns the fault in the text of the setting `name`."""
    # In every text: a line break at the end of a secret file is the usual one.
    if _CONTROL.search(text):
        return "must not have line breaks or other control characters"
    if name in _NO_SPACES and any(char.isspace() for char in text):
        return "must not have spaces"
    rule = RULES.get(name)
    return rule(text) if rule else ""


def number_fault(name: str, value: float) -> str:
    """Returns the fault of a number above its upper bound, which NATS, gRPC and timers have."""
    most = _MOST.get(name.rpartition("_")[2], 2**31 - 1)
    return f"must be at most {most}" if value > most else ""


def _is_host(text: str) -> bool:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ip_address(bare.partition("%")[0])
    except ValueError:
        return bool(_HOST_NAME.fullmatch(text)) and not re.fullmatch(r"[0-9.]+", text)
    return bare == text or isinstance(address, IPv6Address)


def _port_fault(text: str) -> str:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 65535:
        return "has a port that is not a number from 1 to 65535"
    return ""


def _host_port_fault(text: str) -> str:
    """Of "host", "host:port", "[IPv6]:port"."""
    if text.count(":") > 1 and _is_address(text, 6):
        return ""
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(.*))?", text)
    if not match:
        return "" if _is_host(text) else "must name a host (write an IPv6 address as [::1]:port)"
    if not _is_host(match[1]):
        return "must name a host"
    return "" if match[2] is None else _port_fault(match[2])


def listen_host(text: str) -> str:
    """An IP address of this machine, or a name of it."""
    if _is_host(text):
        return ""
    return "must be an IP address or a host name without scheme and port, such as 127.0.0.1"


def _url_fault(text: str, schemes: tuple[str, ...]) -> str:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return "is not a URL: its host or port is malformed"
    if url.scheme not in schemes or not url.netloc:
        return f"must be a URL that begins with {' or '.join(f'{name}://' for name in schemes)}"
    if not _is_host(url.hostname or "") or port == 0:
        return "is not a URL: its host or port is malformed"
    return ""


def base_url(text: str) -> str:
    """Accepts a URL that paths are appended to; may be empty."""
    if not text:
        return ""
    if fault := _url_fault(text, ("http", "https")):
        return fault
    url = urlsplit(text)
    if url.query or url.fragment or "@" in url.netloc:
        return "must not have a user, a query or a fragment: paths are appended to it"
    return ""


def s3_endpoint(text: str) -> str:
    """Where an S3 server answers; may be empty for a role that uses none."""
    if not text:
        return ""
    if fault := _url_fault(text, ("http", "https")):
        return fault
    url = urlsplit(text)
    if "@" in url.netloc:
        return "must not have keys; set IMG2IMG_S3_ACCESS_KEY and IMG2IMG_S3_SECRET_KEY"
    if url.query or url.fragment:
        return "must not have a query or a fragment"
    if url.path.strip("/"):
        return (
            f"must not have a path ({url.path}): the path of a request is the bucket; give the "
            "store a host name of its own"
        )
    return ""


def bucket_name(text: str) -> str:
    """A name that the S3 client takes."""
    if _BUCKET.fullmatch(text) and ".." not in text:
        return ""
    return "must be the name of a bucket: 3 to 63 letters, digits, dots and hyphens"


def otlp_endpoint(text: str) -> str:
    """May be empty."""
    return _url_fault(text, ("http", "https")) if text else ""


def api_address(text: str) -> str:
    """A gRPC target: host:port, or with one of gRPC's schemes."""
    scheme = _GRPC_SCHEME.match(text)
    if not scheme:
        if "://" in text or "/" in text:
            return (
                "must be a gRPC address without http://, such as api.internal:50051 or "
                "dns:///api.internal:50051"
            )
        return _host_port_fault(text)
    rest = text[scheme.end() :]
    if scheme[1] == "dns":
        return _host_port_fault(re.sub(r"^//[^/]*/", "", rest).lstrip("/"))
    if scheme[1] in ("ipv4", "ipv6"):
        for place in re.sub(r"^//[^/]*/", "", rest).split(","):
            host, colon, port = place.rpartition(":")
            if not colon or not _is_address(host, 4 if scheme[1] == "ipv4" else 6):
                return f"must list addresses as {scheme[1]}:ADDRESS:PORT,ADDRESS:PORT"
            if fault := _port_fault(port):
                return fault
        return ""
    return "" if rest.strip("/") else "must name something after its scheme"


def _is_address(text: str, version: int) -> bool:
    try:
        return ip_address(text.strip("[]").partition("%")[0]).version == version
    except ValueError:
        return False


def lists_addresses(text: str) -> bool:
    """Whether a gRPC target names more than one address by number."""
    return text.startswith(("ipv4:", "ipv6:")) and "," in text


def origins(text: str) -> str:
    """Origins of web pages, comma separated; may be empty."""
    for origin in filter(None, (part.strip() for part in text.split(","))):
        if origin in ("*", "loopback", "null"):
            continue
        if not _ORIGIN.fullmatch(origin):
            return (
                f"has the entry {origin!r}: an origin is a scheme and a host in lower case, "
                "without a path or a slash at the end, such as https://shop.example.com"
            )
        if "*" in origin:
            return f"has the entry {origin!r}: `*` is only possible alone, for all origins"
    return ""


def sizes(text: str) -> str:
    """Sizes of images, comma separated; may be empty."""
    if re.fullmatch(r"\s*([1-9]\d{0,4}x[1-9]\d{0,4}\s*(,\s*[1-9]\d{0,4}x[1-9]\d{0,4}\s*)*)?", text):
        return ""
    return "must list sizes as WIDTHxHEIGHT, comma separated, such as 512x512, 768x512"


RULES: Final[Mapping[str, Callable[[str], str]]] = {
    "grpc_host": listen_host,
    "http_host": listen_host,
    "metrics_host": listen_host,
    "api_address": api_address,
    "public_base_url": base_url,
    "s3_endpoint_url": s3_endpoint,
    "s3_bucket": bucket_name,
    "otlp_endpoint": otlp_endpoint,
    "cors_origins": origins,
    "warm_up_sizes": sizes,
}
_NO_SPACES: Final = RULES.keys() - {"cors_origins", "warm_up_sizes"}
