"""The ports of a role, and which setting is wrong if it cannot listen on one of them."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Final

from img2img_server.setting_names import variable
from img2img_server.settings import Settings, SettingsError

# Ports of the roles of `local`, counted from metrics_port.
METRICS_PORTS: Final = ("worker", "api", "gateway")
# Linux takes ports of outgoing connections from 32,768 on.
_FREE_PORTS: Final = range(20_000, 32_000)
BACKLOG: Final = 2048  # connections that wait to be accepted
_WILDCARDS: Final = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


@dataclass(frozen=True, slots=True)
class Listener:
    """A host and a port to listen on, and the settings they come from. Port 0: any free one."""

    host_setting: str
    port_setting: str
    host: str
    port: int
    note: str = ""

    @property
    def address(self) -> str:
        return host_port(self.host, self.port)

    def mistake(self, error: OSError) -> SettingsError:
        """Returns the error of a failed bind, with the setting to correct."""
        port, host = variable(self.port_setting), variable(self.host_setting)
        note = f"; {self.note}" if self.note else ""
        if isinstance(error, socket.gaierror) or (error.errno or 0) < 0:
            # error numbers of getaddrinfo
            return SettingsError(f"{host}: the name {self.host} has no address")
        if error.errno == errno.EADDRINUSE:
            return SettingsError(f"{port}: {self.address} is in use{note}")
        if error.errno == errno.EACCES:
            return SettingsError(f"{port}: this user may not listen on {self.address}{note}")
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return SettingsError(f"{host}: {self.host} is no address of this machine")
        reason = os.strerror(error.errno) if error.errno else str(error)
        return SettingsError(f"{port}: cannot listen on {self.address}: {reason}{note}")

    def open(self) -> socket.socket:
        """Opens a listening socket. Raises SettingsError."""
        if self.port > 65535:
            raise SettingsError(f"{variable(self.port_setting)}: there is no port {self.port}")
        host = self.host.strip("[]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, self.port), family=family, backlog=BACKLOG)
        except OSError as error:
            raise self.mistake(error) from error


def listeners(role: str, settings: Settings) -> list[Listener]:
    """Returns the ports that a role listens on."""
    grpc = Listener("grpc_host", "grpc_port", settings.grpc_host, settings.grpc_port)
    http = Listener("http_host", "http_port", settings.http_host, settings.http_port)
    host, port = settings.metrics_host, settings.metrics_port
    metrics = Listener("metrics_host", "metrics_port", host, port)
    if role == "local":
        count = len(METRICS_PORTS)
        note = f"`local` needs {count} ports in a row from {port} on, or 0 for any free ones"
        row = [
            Listener("metrics_host", "metrics_port", host, port + number if port else 0, note)
            for number in range(count)
        ]
        return [grpc, http, *row]
    return {"api": [grpc, metrics], "gateway": [http, metrics], "worker": [metrics]}.get(role, [])


def reserve(listeners: Sequence[Listener]) -> list[int]:
    """Opens all ports for a moment. Returns their numbers; each 0 becomes a different free port.

    Raises:
        SettingsError: Lists all ports that are not available.
    """
    ports: list[int] = []
    mistakes: list[str] = []
    with ExitStack() as stack:
        for listener in listeners:
            try:
                found = stack.enter_context(_reserved(listener))
            except SettingsError as error:
                mistakes += error.mistakes
            else:
                ports.append(int(found.getsockname()[1]))
    if mistakes:
        raise SettingsError(*mistakes)
    return ports


def free_ports(count: int) -> list[int]:
    """Returns different ports of loopback on which nothing listens now."""
    return reserve([Listener("grpc_host", "grpc_port", "127.0.0.1", 0)] * count)


def _reserved(listener: Listener) -> socket.socket:
    """Opens a port. For 0 it chooses one that no outgoing connection can take before the role
    starts.
    """
    for port in random.sample(_FREE_PORTS, 9) if listener.port == 0 else ():
        with suppress(SettingsError):
            return replace(listener, port=port).open()
    return listener.open()


def host_port(host: str, port: int) -> str:
    """Returns an address as gRPC and URLs write it: IPv6 in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def is_wildcard(host: str) -> bool:
    """Returns whether a host means all addresses of this machine."""
    return host.strip("[]") in _WILDCARDS


def reachable(host: str) -> str:
    """Returns the host for connections from this machine: loopback instead of all addresses."""
    bare = host.strip("[]")
    return _WILDCARDS.get(bare, bare)
