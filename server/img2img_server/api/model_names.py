"""Finds the model that a request means."""

from __future__ import annotations

from collections.abc import Sequence

from img2img_server.domain.models import ModelInfo, WorkerInfo


def default_model(setting: str, models: Sequence[ModelInfo], workers: Sequence[WorkerInfo]) -> str:
    """Returns the model of requests that name none; empty if no model is known.

    That is the model of the setting, or else the first one that a worker serves now, by its place
    in the catalogue and by name, or else the first one that was served before.
    """
    if setting:
        return full_name(setting, models)
    serving = sorted((worker.rank, worker.model.name) for worker in workers if worker.serves)
    known = [name for _, name in serving] or sorted(model.name for model in models)
    return known[0] if known else ""


def full_name(name: str, models: Sequence[ModelInfo]) -> str:
    """Returns the name of the only model that has this name after its owner, `owner/name`; the name
    itself if a model has it, or if several or none of them have it after their owners.
    """
    if any(model.name == name for model in models):
        return name
    found = [model.name for model in models if model.name.rpartition("/")[2] == name]
    return found[0] if len(found) == 1 else name
