"""Fetches a model into a folder, once: `img2img-server fetch-model SOURCE FOLDER`.

Prepares a volume before workers start from it, for example in an init container. SOURCE is
`s3://bucket/prefix` on the S3 server of the settings, with their key, or a hub id, `owner/name` or
`owner/name@revision`. The hub's library reads its own variables (HF_TOKEN, HF_ENDPOINT).

Files are collected in a draft next to the folder. The draft is renamed at the end, after each part
of the model was loaded once. It holds the list of its files, `.img2img-fetched.json`, by which a
folder that lacks files, or has damaged ones, is known as one that was fetched, and fetched again.
Any other folder with files that are no complete model is left as it is, and the command fails.
Several processes may fetch into the same folder at the same time; the first one to finish wins. A
process that is started again continues its own draft as long as the source is unchanged: the draft
is named after host and source, `.model.host-0.0123456789ab`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import structlog
import urllib3
from minio import Minio

from img2img_server.domain.hub_id import HubId
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.local_model import parts_to_load
from img2img_server.engine.family import INDEX, ModelAccessError, ModelError, ModelFiles, read_json
from img2img_server.engine.hub import download_model
from img2img_server.engine.weight_files import weights_of
from img2img_server.extras import install_command
from img2img_server.settings import Settings
from img2img_server.storage.s3_access import BUCKET, S3Access
from img2img_server.storage.s3_blobs import CONNECT_SECONDS, READ_SECONDS
from img2img_server.storage.s3_faults import FAULTS, explain

Parts = Collection[str]
Needed = Callable[[ModelFiles], Parts]

THREADS: Final = 4
LIST: Final = ".img2img-fetched.json"  # the names of the files that were fetched into its folder

log = structlog.get_logger()


def fetch_model(settings: Settings, source: str, target: Path, revision: str = "") -> bool:
    """Fetches the model into `target`. Blocks.

    Args:
        revision: Branch, tag or commit of a hub model. Empty: its main branch.

    Returns:
        False when the folder existed already.

    Raises:
        ModelError: The model cannot be fetched, or is no diffusers model, or the folder has files
            that were not fetched.
    """
    target = target.resolve()  # A link or "." cannot be renamed.
    if not source.startswith("s3://") and HubId.parse(source) is None:
        raise ModelError(
            f"{source} is no source of a model: write s3://bucket/prefix, or a hub id, owner/name"
        )
    if revision and source.startswith("s3://"):
        raise ModelError("--revision is for hub models; objects on an S3 server have none")
    broken = fault_of(target, settings)
    if broken is None:
        log.info("model_exists", folder=str(target))
        return False
    if broken:
        log.warning("model_incomplete", folder=str(target), reason=broken)
    try:
        if source.startswith("s3://"):
            draft = from_s3(settings, source, target)
        else:
            draft = draft_of(target, source, revision)
            from_hub(settings, source, revision, draft)
        check_index(draft, source)
        try:
            prove(draft, settings)
        except ModelError as error:
            why = str(error).replace(str(draft), source)
            raise ModelError(f"{source} was fetched, but does not load: {why}") from error
        return publish(draft, target, source, settings)
    except OSError as error:
        why = " ".join(str(error).split())
        raise ModelError(f"{source} cannot be fetched: {why}") from error


def fault_of(target: Path, settings: Settings, without: Parts = ()) -> str | None:
    """Returns why a folder has to be fetched; empty if nothing is there, None if it is complete.

    Raises:
        ModelError: The folder must not be replaced: it has files that were not fetched, or files
            that must not or cannot be read.
    """
    listed: set[str] = set()
    files: set[str] = set()
    try:
        if not target.exists():
            return ""
        # The list is read first: another process may rename the folder at any moment.
        listed, files = _listed(target), _files(target)
        if not files:
            return ""
        check_files(target, allow_pickles=settings.allow_pickles, without=without)
    except FileNotFoundError:  # Another process has renamed the folder.
        return ""
    except OSError as error:
        raise ModelAccessError(f"{target} cannot be read: {error.strerror}") from error
    except ModelAccessError:
        raise
    except ModelError as error:
        if others := sorted(files - listed):
            raise ModelError(
                f"{target} is no complete model ({error}) and has files that were not fetched, "
                f"such as {others[0]}: name a folder that does not exist, or move them elsewhere"
            ) from error
        return str(error)
    return None


def _files(folder: Path) -> set[str]:
    """Returns the names of all files in a folder, relative to it."""

    def fail(error: OSError) -> None:
        raise error

    found: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=fail):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found.update(str(Path(place, name).relative_to(folder)) for name in files + links)
    return found


def _listed(folder: Path) -> set[str]:
    """Returns the files that were fetched into a folder, with their list; nothing without a list
    that can be read.
    """
    names = None
    with suppress(ModelError, OSError):
        names = read_json(folder / LIST).get("files")
    return {LIST, *map(str, names)} if isinstance(names, list) else set()


def check_files(folder: Path, *, allow_pickles: bool = False, without: Parts = ()) -> None:
    """Checks that each part of a model in diffusers' layout has its files, all of them whole.

    Raises:
        ModelError: The model is of no family, or a file is missing or damaged.
    """
    check_index(folder, str(folder))
    files = ModelFiles.read(folder)
    family = detect(files, str(folder))
    family.check_parts(files)
    for name, (_, class_name) in family.parts(files).items():
        if name in without:
            continue
        has_weights = not re.search(r"Tokenizer|Scheduler|Processor", class_name)
        if has_weights:
            weights_of(folder / name, allow_pickles=allow_pickles)
        elif not (folder / name).is_dir():
            raise ModelError(f"the model has no folder {folder / name}, which {class_name} needs")


def draft_of(target: Path, *source: str) -> Path:
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


def publish(
    draft: Path, target: Path, source: str, settings: Settings, without: Parts = ()
) -> bool:
    """Gives the draft the name of its target. Returns False if a complete model is there already.

    Raises:
        ModelError: The target must not be replaced.
        OSError: The draft cannot be renamed.
    """
    files = sorted(_files(draft) - {LIST})
    text = json.dumps({"source": source, "files": files}, indent=1)
    (draft / LIST).write_text(text + "\n", encoding="utf-8")
    if fault_of(target, settings, without):
        aside = draft.with_name(f"{draft.name}.replaced")
        _remove_incomplete(target, aside, settings, without)
    try:
        draft.rename(target)
    except OSError:
        if fault_of(target, settings, without) is not None:
            raise
        shutil.rmtree(draft)  # Another process has fetched the model meanwhile.
        log.info("model_exists", folder=str(target))
        return False
    log.info("model_fetched", folder=str(target))
    return True


def _remove_incomplete(target: Path, aside: Path, settings: Settings, without: Parts) -> None:
    """Removes an incomplete model that was fetched, by way of the name `aside`.

    Another process may publish a complete model until the target is renamed, so the folder is
    checked again under its new name, which no other process uses.

    Raises:
        ModelError: The folder must not be removed; it has its name again.
    """
    if aside.exists():  # An earlier run was killed here.
        _remove_fetched(aside)
    with suppress(FileNotFoundError):  # Another process has renamed it.
        target.rename(aside)
    if not aside.exists():
        return
    try:
        is_incomplete = fault_of(aside, settings, without) is not None
    except ModelError as error:
        aside.rename(target)
        raise ModelError(str(error).replace(str(aside), str(target))) from error
    if not is_incomplete:
        with suppress(OSError):  # A third process has published a complete model meanwhile.
            aside.rename(target)
            return
    _remove_fetched(aside)


def _remove_fetched(folder: Path) -> None:
    """Removes a folder. Raises ModelError if it has files that were not fetched."""
    others = sorted(_files(folder) - _listed(folder))
    if others:
        raise ModelError(
            f"{folder} has files that were not fetched, such as {others[0]}: move them elsewhere"
        )
    shutil.rmtree(folder)


def from_s3(settings: Settings, source: str, target: Path, without: Parts = ()) -> Path:
    """Returns the draft for the current objects. Raises ModelError, SettingsError."""
    bucket, _, prefix = source.removeprefix("s3://").partition("/")
    if not bucket:
        raise ModelError(f"{source} names no bucket: write s3://bucket/prefix")
    access = replace(S3Access.from_settings(settings), bucket=bucket)
    try:
        return _objects(
            *(access, settings.s3_endpoint_url, f"{prefix.strip('/')}/".lstrip("/"), target),
            without,
        )
    except OSError:  # errors of the disk; urllib3 has its own errors for the network
        raise
    except FAULTS as error:
        fault = explain(error, access)
        why = fault.sentence if fault.setting == BUCKET else str(fault)
        raise ModelError(f"{source} cannot be fetched: {why}") from error


def _objects(
    access: S3Access, endpoint_url: str, prefix: str, target: Path, without: Parts
) -> Path:
    bucket = access.bucket
    connections = urllib3.PoolManager(
        maxsize=THREADS, timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
    )
    client = access.client(connections)
    found = client.list_objects(bucket, prefix=prefix, recursive=True)
    listed = [
        each
        for each in found
        if not each.is_dir
        and (each.object_name or "").removeprefix(prefix).partition("/")[0] not in without
    ]
    if not listed:
        raise ModelError(f"there is nothing at s3://{bucket}/{prefix.rstrip('/')}")
    versions = (f"{each.object_name} {each.etag}" for each in listed)
    draft = draft_of(target, endpoint_url, bucket, *versions)
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


def from_hub(
    settings: Settings, source: str, revision: str, draft: Path, needed: Needed | None = None
) -> None:
    """Downloads the files of a hub model that are loaded. Raises ModelError."""
    if not is_installed("huggingface_hub"):
        raise ModelError(f"hub models need the extra worker: {install_command('worker')}")
    hub_id = HubId.parse(source)
    if hub_id is None:
        raise ModelError(
            f"{source} is no source of a model: write s3://bucket/prefix, or a hub id, owner/name"
        )
    if revision:
        hub_id = HubId(hub_id.repo, revision)
    download_model(
        hub_id,
        needed or partial(parts_to_load, source=source),
        local_dir=draft,
        allow_pickles=settings.allow_pickles,
    )
    # the hub library's notes for later updates of the folder
    shutil.rmtree(draft / ".cache", ignore_errors=True)


def check_index(folder: Path, name: str) -> None:
    """Raises ModelError for a folder that is no model in diffusers' layout.

    Args:
        name: The source or the folder, for the sentence.
    """
    if not (folder / INDEX).is_file():
        raise ModelError(f"{name} is no diffusers model: it has no {INDEX}: name one that has it")


def prove(folder: Path, settings: Settings, without: Parts = ()) -> None:
    """Loads each part of a model once, on the CPU, without keeping it.

    Raises:
        ModelError: A part cannot be loaded.
    """
    if not all(map(is_installed, ("diffusers", "transformers"))):
        check_files(folder, allow_pickles=settings.allow_pickles, without=without)
        log.warning("model_not_loaded", reason="the extra worker is not installed")
        return
    from img2img_server.engine.diffusers.parts import prove_parts  # Importing it takes seconds.

    prove_parts(folder, allow_pickles=settings.allow_pickles, without=without)


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported, without importing it."""
    return find_spec(package) is not None
