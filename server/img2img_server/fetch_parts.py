"""Fetches the parts of a family that its single files do not hold:
`img2img-server fetch-model --parts SOURCE FOLDER`.

SOURCE is the base model in diffusers' layout, as for `fetch-model`, or the name of a family. All
its parts but the denoiser are put into FOLDER/FAMILY, and FOLDER is IMG2IMG_MODEL_PARTS_DIR.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Final

import structlog

from img2img_server.domain.hub_id import HubId
from img2img_server.engine.diffusers.families import detect, families
from img2img_server.engine.family import ModelError, ModelFiles
from img2img_server.fetch_model import (
    check_index,
    draft_of,
    fault_of,
    from_hub,
    from_s3,
    prove,
    publish,
)
from img2img_server.settings import Settings

# Models whose parts fit all models of a family. Some ask for a token of the hub.
BASES: Final = {
    "sd": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-schnell",
    "chroma": "lodestones/Chroma1-HD",
    "z_image": "Tongyi-MAI/Z-Image-Turbo",
}
_DENOISERS: Final = frozenset(family.denoiser for family in families())

log = structlog.get_logger()


class _ExistsError(ModelError):
    """The folder has the parts already."""


def fetch_parts(settings: Settings, source: str, folder: Path, revision: str = "") -> bool:
    """Fetches the parts of a base model into a folder named after its family. Blocks.

    Returns:
        False if they were there already.

    Raises:
        ModelError: They cannot be fetched, or do not load.
    """
    folder = folder.resolve()
    source = BASES.get(source, source)
    is_s3 = source.startswith("s3://")
    if not is_s3 and HubId.parse(source) is None:
        raise ModelError(
            f"{source} is no source of parts: write one of {', '.join(BASES)}, a hub id, "
            "owner/name, or s3://bucket/prefix"
        )
    if revision and is_s3:
        raise ModelError("--revision is for hub models; objects on an S3 server have none")

    def target_of(files: ModelFiles) -> Path:
        return folder / detect(files, source).name

    def needed(files: ModelFiles) -> Collection[str]:
        if fault_of(target_of(files), settings, _DENOISERS) is None:
            raise _ExistsError(f"{target_of(files)} has the parts of {source} already")
        family = detect(files, source)
        return [name for name in family.parts(files) if name not in _DENOISERS]

    draft = folder / "parts"  # Drafts have this name with a dot before it.
    try:
        if is_s3:
            draft = from_s3(settings, source, draft, _DENOISERS)
        else:
            draft = draft_of(draft, source, revision)
            from_hub(settings, source, revision, draft, needed)
        check_index(draft, source)
        target = target_of(ModelFiles.read(draft))
        try:
            prove(draft, settings, _DENOISERS)
        except ModelError as error:
            why = str(error).replace(str(draft), source)
            raise ModelError(f"{source} was fetched, but does not load: {why}") from error
        return publish(draft, target, source, settings, _DENOISERS)
    except _ExistsError:
        shutil.rmtree(draft)
        log.info("parts_exist", folder=str(folder))
        return False
    except OSError as error:
        why = " ".join(str(error).split())
        raise ModelError(f"{source} cannot be fetched: {why}") from error
