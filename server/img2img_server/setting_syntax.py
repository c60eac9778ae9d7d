"""The types of settings that are more than a number or a text. This module reads no file and opens
no connection.

Each rule returns the text, or raises ValueError with a message that continues the setting's name.
No message contains the whole text, which may hold a password.
"""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field

from img2img_server.domain.urls import HOST_NAME, parse_url

_GRPC_SCHEME: Final = re.compile(r"(dns|ipv4|ipv6|unix|unix-abstract|vsock|xds):")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-_:]{1,61}[A-Za-z0-9]")  # the pattern of minio
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+")
_SIZE: Final = r"[1-9]\d{0,4}x[1-9]\d{0,4}\s*"


def _no_spaces(text: str) -> str:
    if any(char.isspace() for char in text):
        raise ValueError("must not have spaces")
    return text


def _address(text: str) -> int:
    """Returns the version of an IP address, or 0 for any other text."""
    try:
        return ip_address(text.strip("[]").partition("%")[0]).version
    except ValueError:
        return 0


def _is_host(text: str) -> bool:
    is_name = HOST_NAME.fullmatch(text.lower()) and not re.fullmatch(r"[0-9.]+", text)
    return bool(is_name or _address(text))


def _check_host_port(text: str) -> None:
    """Checks "host", "host:port", "[IPv6]:port"."""
    if _address(text) != 6 and (
        text.endswith(":") or not _is_host(parse_url(f"http://{text}").host)
    ):
        raise ValueError("must name a host and a port, such as api:50051 or [::1]:50051")


def listen_host(text: str) -> str:
    """Accepts an IP address of this machine, or a host name of this machine."""
    if not _is_host(text):
        example = "such as 127.0.0.1"
        raise ValueError(f"must be an IP address or a host name without scheme and port, {example}")
    return text


def key_prefix(text: str) -> str:
    """Accepts a prefix of keys in the bucket that the lifecycle rules of the service do not
    delete.
    """
    folders = text.removesuffix("/").split("/")
    if text and any(folder in ("", ".", "..") for folder in folders):
        raise ValueError("must be names of folders, such as models/loras")
    if folders[0] in ("generations", "temp"):
        raise ValueError(f"must not begin with {folders[0]}, whose files the bucket deletes")
    return text


def base_url(text: str) -> str:
    """Accepts a URL to which paths are appended, and an empty text."""
    if text and parse_url(text) and ("?" in text or "#" in text):
        raise ValueError("must not have a query or a fragment: paths are appended to it")
    return text


def s3_endpoint(text: str) -> str:
    """Accepts the URL of an S3 server, and an empty text for a role that uses no S3 server."""
    if text and (parse_url(text).target != "/" or "#" in text):
        raise ValueError(
            "must not have a path, a query or a fragment: the path of a request is the bucket; "
            "give the store a host name of its own"
        )
    return text


def bucket_name(text: str) -> str:
    """Accepts a bucket name that the S3 client accepts."""
    if not _BUCKET.fullmatch(text) or ".." in text:
        raise ValueError("must be the name of a bucket: 3 to 63 letters, digits, dots and hyphens")
    return text


def otlp_endpoint(text: str) -> str:
    """Accepts a URL and an empty text."""
    if text:
        parse_url(text)
    return text


def api_address(text: str) -> str:
    """Accepts a gRPC target: host:port, or with one of gRPC's schemes."""
    scheme = _GRPC_SCHEME.match(text)
    if not scheme:
        if "/" in text:
            raise ValueError(
                "must be a gRPC address without http://, such as api.internal:50051 or "
                "dns:///api.internal:50051"
            )
        _check_host_port(text)
        return text
    rest = text[scheme.end() :]
    target = re.sub(r"^//[^/]*/", "", rest)
    if scheme[1] == "dns":
        _check_host_port(target.lstrip("/"))
    elif scheme[1] in ("ipv4", "ipv6"):
        for place in target.split(","):
            host, colon, _ = place.rpartition(":")
            if not colon or _address(host) != int(scheme[1][-1]):
                raise ValueError(f"must list addresses as {scheme[1]}:ADDRESS:PORT,ADDRESS:PORT")
            _check_host_port(place)
    elif not rest.strip("/"):
        raise ValueError("must name something after its scheme")
    return text


def public_grpc_address(text: str) -> str:
    """Accepts "host:port" and an empty text."""
    if text:
        _check_host_port(text)
        if parse_url(f"http://{text}").port is None:
            raise ValueError("must have a port, such as grpc.example.com:443")
    return text


def lists_addresses(text: str) -> bool:
    """Returns whether a gRPC target lists more than one IP address."""
    return text.startswith(("ipv4:", "ipv6:")) and "," in text


def origins(text: str) -> str:
    """Accepts origins of web pages, comma separated, and an empty text."""
    for origin in filter(None, (part.strip() for part in text.split(","))):
        if origin in ("*", "loopback", "null"):
            continue
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"has the entry {origin!r}: an origin is a scheme and a host in lower case, "
                "without a path or a slash at the end, such as https://shop.example.com"
            )
        if "*" in origin:
            raise ValueError(f"has the entry {origin!r}: `*` is only possible alone")
    return text


def networks(text: str) -> str:
    """Accepts IP addresses and networks, comma separated, and an empty text."""
    for entry in filter(None, (part.strip() for part in text.split(","))):
        try:
            ip_network(entry)
        except ValueError:
            example = "such as 10.1.2.3 or 10.0.0.0/8"
            fault = f"has the entry {entry!r}, which is no IP address or network, {example}"
            raise ValueError(fault) from None
    return text


def sizes(text: str) -> str:
    """Accepts sizes of images, comma separated, and an empty text."""
    if not re.fullmatch(rf"\s*({_SIZE}(,\s*{_SIZE})*)?", text):
        raise ValueError(
            "must list sizes as WIDTHxHEIGHT, comma separated, such as 512x512, 768x512"
        )
    return text


def device(text: str) -> str:
    """Accepts a device in torch's notation, and auto."""
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return text


def _default_if_empty(default: str | None) -> BeforeValidator:
    """Replaces an empty path by a default: Path("") would be the working directory."""

    def check(value: Any) -> Any:
        return default if isinstance(value, str) and not value.strip() else value

    return BeforeValidator(check)


_NO_SPACES: Final = AfterValidator(_no_spaces)
ListenHost = Annotated[str, _NO_SPACES, AfterValidator(listen_host)]
ApiAddress = Annotated[str, _NO_SPACES, AfterValidator(api_address)]
PublicGrpcAddress = Annotated[str, AfterValidator(public_grpc_address)]
BaseUrl = Annotated[str, _NO_SPACES, AfterValidator(base_url)]
S3Endpoint = Annotated[str, _NO_SPACES, AfterValidator(s3_endpoint)]
KeyPrefix = Annotated[str, AfterValidator(key_prefix)]
BucketName = Annotated[str, _NO_SPACES, AfterValidator(bucket_name)]
OtlpEndpoint = Annotated[str, _NO_SPACES, AfterValidator(otlp_endpoint)]
Origins = Annotated[str, AfterValidator(origins)]
Networks = Annotated[str, AfterValidator(networks)]
Sizes = Annotated[str, AfterValidator(sizes)]
Device = Annotated[str, AfterValidator(device)]
# The upper bounds are the limits of sockets, NATS, gRPC, timers and JSON.
Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(le=2**31 - 1)]
Bytes = Annotated[int, Field(le=2**53)]
Seconds = Annotated[float, Field(le=31 * 86_400)]
OptionalPath = Annotated[Path | None, _default_if_empty(None)]
StateDir = Annotated[Path, _default_if_empty(".img2img")]
