"""Names the peers of connections, whose shares of budgets are counted apart.

One user has a whole /64 network of IPv6, so its addresses count as one peer.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import unquote

_UNKNOWN = "unknown"


def peer_of(host: str) -> str:
    """Returns the name of the peer with this IP address: the address, or the /64 network of
    IPv6.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return _UNKNOWN
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def grpc_peer_of(peer: str) -> str:
    """Returns the name of the peer that gRPC calls "ipv4:127.0.0.1:50051" or
    "ipv6:%5B::1%5D:50051".
    """
    address = unquote(peer.partition(":")[2])
    return peer_of(address.rpartition(":")[0].strip("[]"))


def is_in(host: str, networks: Iterable[str]) -> bool:
    """Returns whether the address is one of these addresses, or in one of these networks."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(address in ipaddress.ip_network(each, strict=False) for each in networks)
