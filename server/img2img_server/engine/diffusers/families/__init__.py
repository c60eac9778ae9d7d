"""Model families, one module each. Every Family subclass with a name in a module here is served."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.family import ModelError, ModelFiles


@cache
def families() -> tuple[Family, ...]:
    """Returns one object per family, in the order of their names."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in content.values():
            if isinstance(value, type) and issubclass(value, Family) and vars(value).get("name"):
                found.setdefault(value.name, value())
    return tuple(found[name] for name in sorted(found))


def detect(files: ModelFiles, source: str) -> Family:
    """Returns the family of a model, by the class in its model_index.json.

    Raises:
        ModelError: No family serves this class.
    """
    for family in families():
        if files.class_name in family.pipelines:
            return family
    served = ", ".join(sorted({name for family in families() for name in family.pipelines}))
    raise ModelError(
        f"{source} is made for the pipeline {files.class_name or '(none named)'}, which is not "
        f"served. Served are: {served}"
    )
