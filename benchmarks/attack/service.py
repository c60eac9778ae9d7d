"""Runs the service that is attacked: NATS, S3, api, gateway and worker as processes on loopback.

The outbound policy is that of production, except that it allows the one address on which the
attacker's own servers listen.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from cryptography.fernet import Fernet

from benchmarks.attack.target import ATTACKER_HOST, Target
from benchmarks.local_stack import free_port
from img2img_server.api.keys import new_key
from img2img_server.devstack import LocalServers, launch
from img2img_server.nats.connection import connect

START_SECONDS = 120.0
STOP_SECONDS = 10.0
MODULES = {
    "api": ("img2img_server", "api"),
    "gateway": ("img2img_server", "gateway"),
    "worker": ("benchmarks.fake_worker",),
}


def command(*module: str) -> tuple[str, ...]:
    """Returns the command that runs a module in a process that ends with this one."""
    return sys.executable, launch.__file__, str(os.getpid()), sys.executable, "-m", *module


@dataclass
class Role:
    """A role as a process. `metrics_port` has its probes."""

    name: str
    process: asyncio.subprocess.Process
    metrics_port: int
    log: Path

    async def ready(self) -> None:
        """Returns when the role is ready. Raises RuntimeError with its log if it ends."""
        url = f"http://127.0.0.1:{self.metrics_port}/readyz"
        async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as session:
            while True:
                if self.process.returncode is not None:
                    raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-2000:]}")
                with suppress(aiohttp.ClientError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL if the role does not end soon."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


@dataclass
class Service:
    """A running service: `target` is what callers know of it."""

    target: Target
    roles: list[Role] = field(default_factory=list)
    servers: dict[str, int] = field(default_factory=dict)  # process ids by name

    def processes(self) -> dict[str, int]:
        """Returns the process id of every role and server."""
        return {role.name: role.process.pid for role in self.roles} | self.servers

    def died(self) -> list[str]:
        """Returns the names of the roles that have ended."""
        return [role.name for role in self.roles if role.process.returncode is not None]


class Servers:
    """NATS and S3 for all attacks of a run, and the keys of the tenants."""

    def __init__(self, folder: Path, servers: LocalServers) -> None:
        self.folder = folder
        self._servers = servers
        self._storage_key = Fernet.generate_key().decode()
        self._keys_file = folder / "keys.toml"
        self._starts = 0
        self.keys: dict[str, str] = {}
        entries = []
        for tenant, permissions in TENANTS.items():
            self.keys[tenant], entry = new_key(tenant, list(permissions))
            entries.append(entry)
        self._keys_file.write_text("\n".join(entries))

    @asynccontextmanager
    async def service(self, settings: Mapping[str, str]) -> AsyncIterator[Service]:
        """Yields a fresh service: roles without a past and an empty NATS. `settings`: changes."""
        await self._empty()
        grpc_port, http_port = free_port(), free_port()
        environment = self._environment(grpc_port, http_port) | settings
        target = Target(grpc_port, http_port, self.keys)
        self._starts += 1
        async with AsyncExitStack() as exits:
            roles = []
            for name in MODULES:
                role = await self._launch(name, environment)
                exits.push_async_callback(role.stop)
                roles.append(role)
            await asyncio.gather(*(role.ready() for role in roles))
            yield Service(target, roles, _children())

    async def _empty(self) -> None:
        async with connect([self._servers.nats_url]) as link:
            for stream in await link.js.streams_info():
                await link.js.delete_stream(stream.config.name)

    async def _launch(self, name: str, environment: Mapping[str, str]) -> Role:
        port = free_port()
        path = self.folder / f"{self._starts}-{name}.log"
        with path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command(*MODULES[name]),
                env={**environment, "IMG2IMG_METRICS_PORT": str(port)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return Role(name, process, port, path)

    def _environment(self, grpc_port: int, http_port: int) -> dict[str, str]:
        ours = {key: value for key, value in os.environ.items() if "IMG2IMG" not in key}
        return ours | {
            "IMG2IMG_GRPC_PORT": str(grpc_port),
            "IMG2IMG_HTTP_PORT": str(http_port),
            "IMG2IMG_API_ADDRESS": f"127.0.0.1:{grpc_port}",
            "IMG2IMG_API_KEYS_FILE": str(self._keys_file),
            "IMG2IMG_STORAGE_KEYS": self._storage_key,
            "IMG2IMG_NATS_URL": self._servers.nats_url,
            "IMG2IMG_S3_ENDPOINT_URL": self._servers.s3_endpoint_url,
            "IMG2IMG_S3_ACCESS_KEY": self._servers.s3_access_key,
            "IMG2IMG_S3_SECRET_KEY": self._servers.s3_secret_key,
            "IMG2IMG_DEFAULT_MODEL": "fake",
            "IMG2IMG_OUTBOUND_ALLOW": ATTACKER_HOST,
            "IMG2IMG_DRAIN_SECONDS": "1",
            "IMG2IMG_LOG_LEVEL": "info",
        }


TENANTS: dict[str, Sequence[str]] = {
    "innocent": (),
    "attacker-1": ("storage",),
    "attacker-2": (),
}


def _children() -> dict[str, int]:
    """Returns the process ids of the NATS and S3 servers, which are children of this process."""
    found = {}
    for child in psutil.Process().children():
        name = child.name()
        if "nats" in name:
            found["nats"] = child.pid
    return found


@asynccontextmanager
async def running_servers(folder: Path) -> AsyncIterator[Servers]:
    """Yields running NATS and S3 servers."""
    async with LocalServers(folder / "state") as servers:
        yield Servers(folder, servers)
