"""The policy for connections to addresses that callers supply: init images, webhooks, S3 endpoints.

A URL is checked before each request, redirects included. A name is resolved once, all its addresses
are checked, and the connection uses one of them. So a name server cannot pass the check with one
address and connect to another one. The request line contains the URL exactly as the caller wrote
it, see domain/urls.py.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from img2img_server import __version__
from img2img_server.domain.urls import (
    HOST_NAME,
    SCHEME_PORTS,
    UrlError,
    is_web_port,
    join_url,
    parse_url,
)
from img2img_server.outbound.networks import Address, is_public
from img2img_server.outbound.reading import OverheadExceededError, ReadBudget
from img2img_server.settings import Settings, SettingsError

DEFAULT_USER_AGENT = f"img2img/{__version__}"
# Limits of response headers as in browsers: security policies and cookies of large sites exceed
# aiohttp's limits of 8190 bytes a header and 128 headers.
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 512
# A host whose last part is a number is an IPv4 address in some spelling (WHATWG URL, section 3.5):
# 2130706433, 0x7f.1 and 0177.0.0.1 are 127.0.0.1 to one parser and a name to another.
ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")


class ForbiddenAddressError(Exception):
    """The address must not be contacted.

    Attributes:
        cause: A clause for the caller. The exception's own text is for the log: it may name
            addresses that only the service's name server knows.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(detail or cause)
        self.cause = cause


class ConnectionBrokenError(aiohttp.ClientError):
    """The connection ended before the response headers. aiohttp retries such requests by itself
    unless the error has another type.
    """


@dataclass(frozen=True, slots=True)
class OutboundPolicy:
    """Allows public addresses and those that the operator lists.

    `hosts`: names that may have any address. `networks`: addresses that any name may have.
    `user_agent`: the User-Agent of requests.
    """

    hosts: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    user_agent: str = DEFAULT_USER_AGENT

    @classmethod
    def of(cls, settings: Settings) -> OutboundPolicy:
        """Returns the policy that the settings describe. Raises SettingsError."""
        policy = cls.parse(settings.outbound_allow)
        return replace(policy, user_agent=settings.outbound_user_agent or DEFAULT_USER_AGENT)

    @classmethod
    def parse(cls, text: str) -> OutboundPolicy:
        """Reads the setting outbound_allow, for example "files.internal, 10.2.0.0/16, ::1".

        Args:
            text: Empty or "none" if nothing is listed.

        Raises:
            SettingsError: An entry is neither host nor network.
        """
        if text.strip().lower() == "none":
            return cls()
        hosts, networks = set(), []
        for entry in filter(None, (part.strip() for part in text.split(","))):
            try:
                networks.append(ip_network(entry))
            except ValueError:
                host = entry.lower().removesuffix(".")
                if not HOST_NAME.fullmatch(host) or ENDS_IN_NUMBER.fullmatch(host):
                    name = "IMG2IMG_OUTBOUND_ALLOW"
                    raise SettingsError(f"{name}: {entry!r} is neither host nor network") from None
                hosts.add(host)
        return cls(frozenset(hosts), tuple(networks))

    def lists(self, url: URL) -> bool:
        """Returns whether the operator listed the host of a checked URL."""
        host = url.raw_host or ""
        address = _literal(host)
        return host.removesuffix(".") in self.hosts if address is None else self._listed(address)

    def lists_host(self, text: str) -> bool:
        """Returns whether an address passes `check_url` and its host is listed."""
        try:
            return self.lists(self.check_url(text))
        except ForbiddenAddressError:
            return False

    def check_url(self, text: str, base: URL | None = None) -> URL:
        """Checks an address without resolving its name.

        Args:
            text: Absolute http or https URL, or a reference relative to base.

        Raises:
            ForbiddenAddressError: The address is malformed, has a user part, a port of another
                protocol, or a host that is not public, or an IP address in an unusual spelling.
        """
        try:
            parsed = parse_url(text) if base is None else join_url(parse_url(str(base)), text)
            named = URL.build(scheme=parsed.scheme, host=parsed.host, port=parsed.port)
        except UrlError as error:
            raise ForbiddenAddressError(f"the address {error}") from error
        except ValueError as error:  # The host is not a valid international name.
            raise ForbiddenAddressError("the address has a host name that is not valid") from error
        # yarl cannot express an empty query, so path and query are kept together as they are sent.
        authority = named.raw_authority
        url = URL.build(scheme=parsed.scheme, authority=authority, path=parsed.target, encoded=True)
        self._check_host(url.raw_host or "")
        self._check_port(url)
        return url

    def _check_host(self, host: str) -> None:
        """Checks the host of a request. Of a name, only the syntax is checked."""
        address = _literal(host)
        if address is not None:
            self.check_addresses(host, [address])
        elif not HOST_NAME.fullmatch(host):
            raise ForbiddenAddressError("the address has a host name that is not well formed")

    def _check_port(self, url: URL) -> None:
        port = url.port or 0
        if not (is_web_port(port) or (port and self.lists(url))):
            raise ForbiddenAddressError(f"port {port} is not a port for HTTP")

    def check_addresses(self, host: str, addresses: Iterable[Address]) -> None:
        """Refuses a host when any of its addresses is refused.

        Raises:
            ForbiddenAddressError: An address is not public and neither it nor the host is listed.
        """
        if host.removesuffix(".") in self.hosts:
            return
        for address in addresses:
            if not is_public(address) and not self._listed(address):
                detail = f"{host} has an address that is not public: {address}"
                raise ForbiddenAddressError("the address is not public", detail)

    def _listed(self, address: Address) -> bool:
        return any(address in network for network in self.networks)

    @asynccontextmanager
    async def open_session(
        self, resolver: AbstractResolver | None = None, budget: ReadBudget | None = None
    ) -> AsyncIterator[aiohttp.ClientSession]:
        """Opens a session that cannot connect to a forbidden address: no proxy, no cookies.

        Its requests raise ForbiddenAddressError, and OverheadExceededError if the servers exceed
        the budget before they answer. The caller follows redirects itself, with check_url: the
        session would not see the user part of a redirect.

        Args:
            resolver: Resolves names; DNS by default.
            budget: Limits the bytes of all responses; the caller adds their content to it. By
                default, they may have as many bytes as other responses without their content.
        """
        budget = budget or ReadBudget()
        # c-ares is used instead of getaddrinfo, which occupies a thread while a name server is
        # slow.
        names = resolver or aiohttp.AsyncResolver()
        try:
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=_CheckingResolver(self, names),
                    use_dns_cache=False,
                    socket_factory=budget.open_socket,
                ),
                middlewares=(partial(self._guard, budget),),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity", "User-Agent": self.user_agent},
                auto_decompress=False,
                max_line_size=MAX_HEADER_BYTES,
                max_field_size=MAX_HEADER_BYTES,
                max_headers=MAX_HEADERS,
                trust_env=False,
            ) as session:
                yield session
        finally:
            await names.close()

    async def _guard(
        self,
        budget: ReadBudget,
        request: aiohttp.ClientRequest,
        handler: aiohttp.ClientHandlerType,
    ) -> aiohttp.ClientResponse:
        """Checks hosts that are IP addresses, which the resolver does not see."""
        url = request.url
        if url.scheme not in SCHEME_PORTS:
            raise ForbiddenAddressError("the address is not an http or https URL")
        self._check_host(url.raw_host or "")
        self._check_port(url)
        try:
            return await handler(request)
        except (aiohttp.ClientError, OSError) as error:
            if budget.exceeded:
                raise OverheadExceededError from error
            broken = isinstance(error, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError)
            if broken and not isinstance(error, aiohttp.ClientConnectorError):
                raise ConnectionBrokenError from error
            raise


class _CheckingResolver(AbstractResolver):
    """Returns the addresses that another resolver found, if all of them are allowed."""

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
    """Returns the URL as logs may show it: without query, fragment and user part."""
    try:
        parsed = URL(url.strip())
        if not parsed.host:  # The text may be a password.
            return "malformed"
        return str(parsed.with_user(None).with_query(None).with_fragment(None))
    except ValueError:
        return "malformed"


def shown_origin(url: str) -> str:
    """Returns scheme, host and port of the URL, for logs. The path of a webhook may be a secret."""
    try:
        parsed = URL(url.strip())
        return str(parsed.with_user(None).origin()) if parsed.host else "malformed"
    except ValueError:
        return "malformed"


def _literal(host: str) -> Address | None:
    """Returns the IP address in the host, or None if the host is a name.

    Raises:
        ForbiddenAddressError: The host is an IP address in an unusual spelling.
    """
    try:
        if ":" in host:
            if "%" in host:
                raise ForbiddenAddressError("the address has a zone")
            return IPv6Address(host)
        return IPv4Address(host) if ENDS_IN_NUMBER.fullmatch(host) else None
    except ValueError as error:
        cause = "the host is an IP address in a spelling that is not accepted"
        raise ForbiddenAddressError(cause) from error
