"""The service that is broken: NATS, S3, two apis and workers, each a process on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from benchmarks.local_stack import free_port
from img2img_server.devstack import launch, weed
from img2img_server.devstack.child import HOST, Child
from img2img_server.devstack.files import kept_secret
from img2img_server.devstack.nats import nats_server, nats_url
from img2img_server.ports import free_ports
from tests.nats_cluster import NatsCluster

READY_SECONDS = 120.0
STOP_SECONDS = 45.0
ACK_WAIT_SECONDS = 4.0
WORKERS = ("one", "two", "three")


class Role:
    """A role as a process that can be killed, stopped and started again."""

    def __init__(self, kind: str, environment: dict[str, str], log: Path) -> None:
        self.kind = kind
        self._metrics_port = free_port()
        self._log = log
        clean = {name: text for name, text in os.environ.items() if "IMG2IMG" not in name}
        mine = {"IMG2IMG_METRICS_PORT": str(self._metrics_port)}
        self._environment = {**clean, **environment, **mine}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, **environment: str) -> None:
        """Returns when the role is ready. Raises RuntimeError with its log if it ends.

        Args:
            environment: changes of this start only.
        """
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, launch.__file__, str(os.getpid())),
                *(sys.executable, "-m", "benchmarks.chaos.role", self.kind),
                env=self._environment | environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(READY_SECONDS):
            while (await self.readiness())[0] != 200:
                if self._process.returncode is not None:
                    raise RuntimeError(f"{self.kind} ended: {self._log.read_text()[-3000:]}")
                await asyncio.sleep(0.02)

    async def readiness(self) -> tuple[int, str]:
        """Returns the status and the text of /readyz; 0 without a response."""
        url = f"http://{HOST}:{self._metrics_port}/readyz"
        with suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                return answer.status, await answer.text()
        return 0, ""

    def signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process is not None
        await self._process.wait()

    async def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        if self._process is None:
            return 0
        self.signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            return await self._process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")


class Server:
    """NATS or the S3 server."""

    def __init__(self, child: Child) -> None:
        self.child = child

    def signal(self, number: int) -> None:
        assert self.child.pid is not None
        os.kill(self.child.pid, number)

    async def away(self, seconds: float) -> None:
        """Kills the server and starts it again with its data."""
        self.signal(signal.SIGKILL)
        await self.child.ended()
        await asyncio.sleep(seconds)
        async with asyncio.timeout(READY_SECONDS):
            await self.child.start()

    async def frozen(self, seconds: float) -> None:
        """Lets the server keep its connections without responding."""
        self.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.signal(signal.SIGCONT)


class Service:
    """The addresses of the servers, and methods that start roles."""

    def __init__(
        self, folder: Path, environment: dict[str, str], nats: Server | None, store: Server
    ) -> None:
        self.folder = folder
        self.nats = nats
        self.cluster: NatsCluster | None = None
        self.store = store
        self.environment = environment
        self._api_ports = (free_port(), free_port())
        self._exits = AsyncExitStack()
        self.apis: list[Role] = []
        self.workers: list[Role] = []

    @property
    def address(self) -> str:
        """The address of both apis for a client."""
        return "ipv4:" + ",".join(f"{HOST}:{port}" for port in self._api_ports)

    def role(self, kind: str, name: str, **environment: str) -> Role:
        """Creates a role, which is stopped with the service."""
        merged = {**self.environment, "IMG2IMG_WORKER_NAME": name, **environment}
        role = Role(kind, merged, self.folder / f"{name}.log")
        self._exits.push_async_callback(role.stop)
        return role

    def worker(self, name: str) -> Role:
        """Returns the worker with this name."""
        return self.workers[WORKERS.index(name)]

    async def start(self) -> None:
        """Starts two apis and three workers."""
        for index, port in enumerate(self._api_ports):
            self.apis.append(self.role("api", f"api-{index}", IMG2IMG_GRPC_PORT=str(port)))
        self.workers = [self.role("worker", name) for name in WORKERS]
        await asyncio.gather(*(role.start() for role in (*self.apis, *self.workers)))

    async def stop(self) -> None:
        await self._exits.aclose()


def environment_of(nats: str, store: str, keys: tuple[str, str]) -> dict[str, str]:
    return {
        "IMG2IMG_NATS_URL": nats,
        "IMG2IMG_S3_ENDPOINT_URL": store,
        "IMG2IMG_S3_ACCESS_KEY": keys[0],
        "IMG2IMG_S3_SECRET_KEY": keys[1],
        "IMG2IMG_DEV_KEY": "true",
        "IMG2IMG_QUEUE_LIMIT": "2000",
        "IMG2IMG_MAX_TENANT_CALLS": "2000",
        "IMG2IMG_ACK_WAIT_SECONDS": str(ACK_WAIT_SECONDS),
        # Kills in a row may hit one job; the kill rate is that of the scenario and not of a fleet.
        "IMG2IMG_MAX_ATTEMPTS": "20",
        "IMG2IMG_DRAIN_SECONDS": "10",
        "IMG2IMG_DEFAULT_MODEL": "fake",
        "FAKE_STEP_SECONDS": "0.05",
    }


@asynccontextmanager
async def running_service(
    folder: Path, nats_urls: str = "", **environment: str
) -> AsyncIterator[Service]:
    """Yields a running service. `nats_urls`: an existing cluster instead of one NATS server."""
    folder.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240
    keys = weed.key_pair(folder)
    ports = dict(zip(weed.PORTS, free_ports(len(weed.PORTS)), strict=True))
    children = [weed.weed(folder, ports)]
    nats = None
    if not nats_urls:
        (port,) = free_ports(1)
        password = kept_secret(folder / "nats.password")
        children.append(nats_server(folder, port, password))
        nats, nats_urls = Server(children[-1]), nats_url(port, password)
    try:
        async with asyncio.timeout(READY_SECONDS):
            await asyncio.gather(*(child.start() for child in children))
        merged = environment_of(nats_urls, f"http://{HOST}:{ports['s3']}", keys) | environment
        service = Service(folder, merged, nats, Server(children[0]))
        try:
            await service.start()
            yield service
        finally:
            await service.stop()
    finally:
        await asyncio.gather(*(child.stop() for child in children))
        weed.remove_sockets(ports)
