"""Reads the address of a service: host:port, or a target of gRPC with one or more addresses."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from img2img_client.errors import InvalidArgumentError, invalid

DEFAULT_PORT = 50051
# Schemes of gRPC whose addresses this client does not read.
OTHER_SCHEMES = ("unix:", "unix-abstract:", "vsock:", "xds:")
_ADDRESSES = re.compile(r"(?P<scheme>dns|ipv4|ipv6):(?://(?P<authority>[^/]*)/)?(?P<rest>.*)", re.S)
_ADDRESS = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^/\[\]:,\s]*)):(?P<port>\d{1,9})"
)
_FORMS = {
    "dns": "a host name with a port",
    "ipv4": "an IPv4 address with a port, such as 10.0.0.7:50051",
    "ipv6": "an IPv6 address with a port, such as [fd00::7]:50051",
}


@dataclass(frozen=True, slots=True)
class Target:
    """An address of the service. `text`: the target that gRPC gets. `addresses`: host and port of
    each address; empty for a socket file and for forms that only gRPC knows."""

    text: str
    addresses: tuple[tuple[str, int], ...] = ()
    has_own_resolver: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether the service runs on this machine."""
        if self.text.startswith(("unix:", "unix-abstract:")):
            return True
        is_here = bool(self.addresses) and all(_is_loopback(host) for host, _ in self.addresses)
        return is_here and not self.has_own_resolver


def parse(server: str) -> Target:
    """Returns the target of an address. A port that is left out is DEFAULT_PORT.

    Raises:
        InvalidArgumentError: no service can have this address.
    """
    server = server.strip()
    if server.startswith(("http://", "https://")):
        raise _invalid(f"server must be host:port without http://, not {server!r}")
    if server.startswith(OTHER_SCHEMES):
        return Target(server)
    match = _ADDRESSES.fullmatch(server)
    if match is None:
        return _parse_pair(server)
    scheme, authority = match["scheme"], match["authority"]
    parts = [match["rest"]] if scheme == "dns" else match["rest"].split(",")
    texts = [_with_port(part.strip()) for part in parts]
    addresses = []
    for part, text in zip(parts, texts, strict=True):
        address = _read(text)
        if address is None or not _fits(scheme, address[0]):
            raise _invalid(f"{part!r} in the server {server!r} is not {_FORMS[scheme]}")
        addresses.append(address)
    prefix = f"{scheme}:" if authority is None else f"{scheme}://{authority}/"
    return Target(prefix + ",".join(texts), tuple(addresses), bool(authority))


def _parse_pair(server: str) -> Target:
    text = _with_port(server)
    if (address := _read(text)) is None:
        hint = ""
        if "," in server:
            hint = "; several addresses are ipv4:10.0.0.7:50051,10.0.0.8:50051 or one DNS name"
        raise _invalid(
            f"server must be host:port with a port from 1 to 65535, not {server!r}{hint}"
        )
    return Target(text, (address,))


def _with_port(address: str) -> str:
    bare_v6 = address.count(":") > 1 and not address.startswith("[")
    host = f"[{address}]" if bare_v6 else address
    has_port = ":" in host.rpartition("]")[2]
    return host if has_port or not host else f"{host}:{DEFAULT_PORT}"


def _read(text: str) -> tuple[str, int] | None:
    """Returns the host and the port; None if the text has another form."""
    match = _ADDRESS.fullmatch(text)
    host = (match["v6"] or match["host"] or "") if match else ""
    port = int(match["port"]) if match else 0
    return (host, port) if host and 0 < port < 65536 else None


def _fits(scheme: str, host: str) -> bool:
    if scheme == "dns":
        return True
    try:
        return ipaddress.ip_address(host).version == int(scheme[-1])
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _invalid(text: str) -> InvalidArgumentError:
    return invalid("server", "INVALID_FORMAT", text)
