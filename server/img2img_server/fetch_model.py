"""Fetches a model into a folder, once: `img2img-server fetch-model SOURCE FOLDER`.

Prepares a volume before workers start from it, for example in an init container. SOURCE is
`s3://bucket/prefix` on the S3 server of the settings, with their key, or a hub id `owner/name`. The
hub's library reads its own variables (HF_TOKEN, HF_ENDPOINT).

A folder that exists is complete: files are collected in a draft next to it, which is renamed at
the end. Several processes may fetch into the same folder at the same time; the first one to finish
wins. A process that is started again continues its own draft as long as the source is unchanged:
the draft is named after host and source, `.model.host-0.0123456789ab`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog
import urllib3
from minio import Minio

from img2img_server.engine.family import ModelError
from img2img_server.settings import Settings
from img2img_server.storage.s3_access import BUCKET, S3Access
from img2img_server.storage.s3_blobs import CONNECT_SECONDS, READ_SECONDS
from img2img_server.storage.s3_faults import FAULTS, explain

INDEX: Final = "model_index.json"
THREADS: Final = 4
# The files of a diffusers directory, without pickles, which can run code, and without variants in
# other precisions.
HUB_FILES: Final = (INDEX, "*/*.json", "*/*.txt", "*/*.jinja", "*/*.model", "*/*.safetensors")
HUB_OTHERS: Final = ("*.fp16.*", "*.non_ema.*", "*/openvino*", "*/flax*")

log = structlog.get_logger()


def fetch_model(settings: Settings, source: str, target: Path, revision: str = "") -> bool:
    """Fetches the model into `target`. Blocks.

    Args:
        revision: Branch, tag or commit of a hub model. Empty: its main branch.

    Returns:
        False when the folder existed already.

    Raises:
        ModelError: The model cannot be fetched, or is no diffusers model.
    """
    if target.is_dir():
        log.info("model_exists", folder=str(target))
        return False
    try:
        if source.startswith("s3://"):
            draft = _from_s3(settings, source, target)
        else:
            draft = _draft(target, source, revision)
            _from_hub(source, revision, draft)
        if not (draft / INDEX).is_file():
            raise ModelError(f"{source} is no diffusers model: it has no {INDEX}")
        return _publish(draft, target)
    except OSError as error:
        why = " ".join(str(error).split())  # Errors of the hub's library have several lines.
        raise ModelError(f"{source} cannot be fetched: {why}") from error


def _draft(target: Path, *source: str) -> Path:
    """Creates this host's draft of a source; removes its drafts of other sources."""
    start = f".{target.name}.{socket.gethostname()}"
    digest = hashlib.sha256("\0".join(source).encode()).hexdigest()[:12]
    draft = target.with_name(f"{start}.{digest}")
    draft.mkdir(parents=True, exist_ok=True)
    of_this_host = re.compile(re.escape(start) + r"\.[0-9a-f]{12}")
    for found in target.parent.iterdir():
        if found != draft and of_this_host.fullmatch(found.name):
            shutil.rmtree(found)
            log.info("draft_of_other_source_removed", folder=str(found))
    return draft


def _publish(draft: Path, target: Path) -> bool:
    try:
        draft.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(draft)  # Another process has fetched the model meanwhile.
        log.info("model_exists", folder=str(target))
        return False
    log.info("model_fetched", folder=str(target))
    return True


def _from_s3(settings: Settings, source: str, target: Path) -> Path:
    """Returns the draft for the current objects. Raises ModelError, SettingsError."""
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    access = replace(S3Access.from_settings(settings), bucket=bucket)
    try:
        return _objects(access, settings.s3_endpoint_url, prefix.rstrip("/") + "/", target)
    except OSError:  # errors of the disk; urllib3 has its own errors for the network
        raise
    except FAULTS as error:
        fault = explain(error, access)
        why = fault.sentence if fault.setting == BUCKET else str(fault)
        raise ModelError(f"{source} cannot be fetched: {why}") from error


def _objects(access: S3Access, endpoint_url: str, prefix: str, target: Path) -> Path:
    bucket = access.bucket
    connections = urllib3.PoolManager(
        maxsize=THREADS, timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
    )
    client = access.client(connections)
    found = client.list_objects(bucket, prefix=prefix, recursive=True)
    listed = [each for each in found if not each.is_dir]
    if not listed:
        raise ModelError(f"there is nothing at s3://{bucket}/{prefix.rstrip('/')}")
    versions = (f"{each.object_name} {each.etag}" for each in listed)
    draft = _draft(target, endpoint_url, bucket, *versions)
    files = [(each.object_name or "", each.size or 0) for each in listed]
    with ThreadPoolExecutor(THREADS) as pool:
        wanted = [(name, size, _place(draft, name.removeprefix(prefix))) for name, size in files]
        # list() raises the errors of the threads.
        list(pool.map(lambda each: _file(client, bucket, *each), wanted))
    connections.clear()
    return draft


def _file(client: Minio, bucket: str, name: str, size: int, path: Path) -> None:
    if path.is_file() and path.stat().st_size == size:
        return  # files of an earlier attempt
    client.fget_object(bucket, name, str(path))
    log.info("model_file_fetched", file=name, size_bytes=size)


def _place(draft: Path, name: str) -> Path:
    """Returns the path of a file. Raises ModelError for a name that leads out of the folder."""
    path = (draft / name).resolve()
    if not path.is_relative_to(draft.resolve()):
        raise ModelError(f"{name!r} is no name for a file of a model")
    return path


def _from_hub(source: str, revision: str, draft: Path) -> None:
    from huggingface_hub import snapshot_download  # Importing the library takes a second.

    snapshot_download(
        source,
        revision=revision or None,
        local_dir=draft,
        allow_patterns=list(HUB_FILES),
        ignore_patterns=list(HUB_OTHERS),
    )
    # the hub library's notes for later updates of the folder
    shutil.rmtree(draft / ".cache", ignore_errors=True)
