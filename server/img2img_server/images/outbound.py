"""Which addresses that callers supply the service connects to: init images, webhooks, S3 endpoints.

A URL is checked before each request, redirects included. A name is resolved once, every address it
has is checked, and the connection goes to those very addresses: an answer that changes between
check and connect changes nothing.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from img2img_server.domain.params import is_http_url, is_web_port
from img2img_server.images.networks import Address, is_public
from img2img_server.settings import SettingsError

# A host whose last part is a number is an IPv4 address in some spelling (WHATWG URL, section 3.5):
# 2130706433, 0x7f.1 and 0177.0.0.1 are 127.0.0.1 to one parser and a name to another.
ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")
LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"(?=.{{1,254}}$){LABEL}(?:\.{LABEL})*\.?")
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "img2img"}


class ForbiddenAddressError(Exception):
    """The address must not be contacted; the sentence says why, for the log only."""


@dataclass(frozen=True, slots=True)
class OutboundPolicy:
    """Public addresses are allowed, and those that the operator lists.

    `hosts`: names that may have any address. `networks`: addresses that any name may have.
    """

    hosts: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> OutboundPolicy:
        """Reads the setting outbound_allow, for example "files.internal, 10.2.0.0/16, ::1".

        Raises:
            SettingsError: an entry is neither host nor network.
        """
        hosts, networks = set(), []
        for entry in filter(None, (part.strip() for part in text.split(","))):
            try:
                networks.append(ip_network(entry))
            except ValueError:
                host = entry.lower().removesuffix(".")
                if not NAME.fullmatch(host) or ENDS_IN_NUMBER.fullmatch(host):
                    name = "IMG2IMG_OUTBOUND_ALLOW"
                    raise SettingsError(f"{name}: {entry!r} is neither host nor network") from None
                hosts.add(host)
        return cls(frozenset(hosts), tuple(networks))

    def lists(self, url: URL) -> bool:
        """Whether the operator listed the host of a checked URL; only there http webhooks go."""
        host = url.raw_host or ""
        address = _literal(host)
        return host.removesuffix(".") in self.hosts if address is None else self._listed(address)

    def lists_host(self, text: str) -> bool:
        """Whether an address is good as far as can be told, and its host listed."""
        try:
            return self.lists(self.check_url(text))
        except ForbiddenAddressError:
            return False

    def check_url(self, text: str, base: URL | None = None) -> URL:
        """Checks everything about an address that can be told without resolving its name.

        Args:
            text: absolute http or https URL, or a reference relative to base.

        Raises:
            ForbiddenAddressError: malformed, with a user part, oddly spelled, or not public.
        """
        # Some parsers take a backslash for a slash and see another host than others.
        if "\\" in text or any(ord(char) < 32 for char in text):
            raise ForbiddenAddressError("malformed")
        if base is None and not is_http_url(text):
            raise ForbiddenAddressError("malformed or not http")
        try:
            authority = urlsplit(text).netloc
            url = URL(text) if base is None else base.join(URL(text))
        except ValueError as error:
            raise ForbiddenAddressError("malformed") from error
        if "@" in authority:
            raise ForbiddenAddressError("user part")
        if "[" in authority and ":" not in (url.raw_host or ""):
            raise ForbiddenAddressError("odd host name")
        self._check(url)
        return url

    def _check(self, url: URL) -> None:
        """Checks scheme, host and port of one request."""
        if not is_http_url(str(url)):
            raise ForbiddenAddressError("malformed or not http")
        host, port = url.raw_host or "", url.port or 0
        address = _literal(host)
        if address is not None:
            self.check_addresses(host, [address])
        elif not NAME.fullmatch(host):
            raise ForbiddenAddressError("odd host name")
        if not (is_web_port(port) or (port and self.lists(url))):
            raise ForbiddenAddressError("port of another protocol")

    def check_addresses(self, host: str, addresses: Iterable[Address]) -> None:
        """Refuses a host when any of its addresses is refused.

        Raises:
            ForbiddenAddressError: an address is not public and neither it nor the host is listed.
        """
        if host.removesuffix(".") in self.hosts:
            return
        for address in addresses:
            if not is_public(address) and not self._listed(address):
                raise ForbiddenAddressError(f"{host} has an address that is not public: {address}")

    def _listed(self, address: Address) -> bool:
        return any(address in network for network in self.networks)

    @asynccontextmanager
    async def open_session(
        self, resolver: AbstractResolver | None = None
    ) -> AsyncIterator[aiohttp.ClientSession]:
        """Opens a session that cannot connect to a forbidden address: no proxy, no cookies.

        Its requests raise ForbiddenAddressError. Follow redirects by hand, with check_url: of a
        redirect that the session follows by itself it does not see the user part.

        Args:
            resolver: asked for the addresses of names; DNS by default.
        """
        # c-ares rather than getaddrinfo: a slow name server holds no thread.
        names = resolver or aiohttp.AsyncResolver()
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=_CheckingResolver(self, names), use_dns_cache=False
                ),
                middlewares=(self._guard,),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers=HEADERS,
                auto_decompress=False,
                trust_env=False,
            ) as session:
                yield session
        finally:
            await names.close()

    async def _guard(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Checks what the resolver does not see: hosts that are addresses already."""
        self._check(request.url)
        return await handler(request)


class _CheckingResolver(AbstractResolver):
    """Hands on the addresses that another resolver found, all of them or none."""

    def __init__(self, policy: OutboundPolicy, names: AbstractResolver) -> None:
        self._policy = policy
        self._names = names

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        results = await self._names.resolve(host, port, family)
        self._policy.check_addresses(host, [ip_address(result["host"]) for result in results])
        return results

    async def close(self) -> None:
        await self._names.close()


def shown(url: str) -> str:
    """The URL as logs may show it: without query, fragment and user part."""
    try:
        return str(URL(url).with_user(None).with_query(None).with_fragment(None))
    except ValueError:
        return "malformed"


def _literal(host: str) -> Address | None:
    """The address that the host is, None when it is a name.

    Raises:
        ForbiddenAddressError: an address in an odd spelling.
    """
    try:
        if ":" in host:
            if "%" in host:
                raise ForbiddenAddressError("zone in an address")
            return IPv6Address(host)
        return IPv4Address(host) if ENDS_IN_NUMBER.fullmatch(host) else None
    except ValueError as error:
        raise ForbiddenAddressError("odd spelling of an address") from error
