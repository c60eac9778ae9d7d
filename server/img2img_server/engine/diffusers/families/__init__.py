"""Model families, one module each. Every Family subclass with a name in a module here is served."""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from functools import cache
from typing import Final

from img2img_server.engine.diffusers.families.base import Family
from img2img_server.engine.family import ModelError, ModelFiles

# The beginnings of the classes of other programs.
_FORMATS: Final = {"Onnx": "ONNX", "ORT": "ONNX", "OV": "OpenVINO", "Flax": "Flax"}
_CLOSE: Final = 0.95


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
    raise ModelError(f"{source} {_why_not_served(files)}")


def _why_not_served(files: ModelFiles) -> str:
    """Returns the end of a sentence about a pipeline of no family."""
    wanted = files.index.get("_class_name")
    if not wanted:
        return "names no pipeline: its model_index.json has no _class_name: fetch the file again"
    served = {name for family in families() for name in family.pipelines}
    # Each family has a class of this form, and further ones that are derived from it.
    shown = ", ".join(sorted(it for it in served if "Img2Img" not in it and "Inpaint" not in it))
    why = f"is made for the pipeline {files.class_name}, which is not served"
    if not isinstance(wanted, str):
        return f"{why}: code that comes with a model is not run: use a model without it"
    for start, form in _FORMATS.items():
        if wanted.startswith(start):
            return f"{why}: its files are in the format of {form}: use the model in .safetensors"
    if close := get_close_matches(wanted, served, 1, _CLOSE):
        why += f"; if {close[0]} is meant, correct model_index.json"
    return f"{why}: use a model of one of these classes: {shown}"
