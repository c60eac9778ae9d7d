"""Deletes the files that the hub's library caches of a model that was named by its hub id."""

from __future__ import annotations

import shutil
from pathlib import Path

import structlog

from img2img_server.domain.hub_id import HubId

log = structlog.get_logger()


def forget_downloads(source: str, cache: Path | None = None) -> int:
    """Deletes the cached files of this model and returns the number of bytes freed. Blocks.

    The loaded model continues to run; the next start downloads it again. A model in a directory of
    the operator is not deleted. No file is deleted while HF_HUB_OFFLINE is set.

    Args:
        cache: the folder of the cache; by default the library's own.
    """
    hub_id = None if Path(source).exists() else HubId.parse(source)
    if hub_id is None:
        return 0
    # Importing the library takes a second.
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    if constants.HF_HUB_OFFLINE:
        log.info("downloads_kept_hub_offline", model=source)
        return 0
    try:
        found = scan_cache_dir(cache)
    except CacheNotFound:
        return 0
    # Files are deleted by folder, not by revision: a copied repository may have the same revisions.
    ours = [
        repo for repo in found.repos if (repo.repo_type, repo.repo_id) == ("model", hub_id.repo)
    ]
    for repo in ours:
        shutil.rmtree(repo.repo_path)
    freed = sum(repo.size_on_disk for repo in ours)
    log.info("downloads_deleted", model=source, bytes=freed)
    return freed
