"""Catalogues with mistakes, or with models that have some."""

from __future__ import annotations

import json

from tests.doctor_forms.forms import (
    AGAIN,
    CORRECT,
    POINTER,
    SERVE,
    UNET,
    Builder,
    Settings,
    advice,
    broken,
)

ENTRY = '[[models]]\nname = "photo"\nsource = "model"\n'


def _toml(builder: Builder, text: str) -> Settings:
    builder.sd()
    return {"MODELS_FILE": builder.bytes("models.toml", text.encode())}


@broken("models.toml", r"line \d", advice=CORRECT)
def catalogue_that_is_no_toml(builder: Builder) -> Settings:
    return _toml(builder, '[[models]]\nname: "photo"\n')


@broken("models.json", r"line \d", advice=CORRECT)
def catalogue_with_a_trailing_comma(builder: Builder) -> Settings:
    builder.sd()
    text = b'{"models": [{"name": "photo", "source": "model"},]}'
    return {"MODELS_FILE": builder.bytes("models.json", text)}


@broken("models.yaml", "TOML|JSON", advice=SERVE + "|" + CORRECT)
def catalogue_in_yaml(builder: Builder) -> Settings:
    builder.sd()
    text = b"models:\n  - name: photo\n    source: model\n"
    return {"MODELS_FILE": builder.bytes("models.yaml", text)}


@broken("models.json", "UTF-8|encod", advice=CORRECT)
def catalogue_in_utf_16(builder: Builder) -> Settings:
    builder.sd()
    text = json.dumps({"models": [{"name": "photo", "source": "model"}]})
    return {"MODELS_FILE": builder.bytes("models.json", text.encode("utf-16"))}


@broken("models.toml", "empty|no models|models", advice=CORRECT + "|" + advice("list", "add"))
def empty_catalogue(builder: Builder) -> Settings:
    return _toml(builder, "")


@broken("models.toml", "photo", "lora\\b|lora_dir", advice=CORRECT + "|" + SERVE)
def catalogue_with_an_unknown_field(builder: Builder) -> Settings:
    return _toml(builder, ENTRY + 'lora = "loras"\n')


@broken("models.toml", "photo", "native_size", advice=CORRECT + "|" + advice("be"))
def catalogue_with_text_for_a_number(builder: Builder) -> Settings:
    return _toml(builder, ENTRY + '[models.defaults]\nnative_size = "big"\n')


@broken("models.toml", "photo", "twice|two|2 models|same|duplicate", advice=CORRECT + "|" + SERVE)
def catalogue_with_one_name_twice(builder: Builder) -> Settings:
    return _toml(builder, ENTRY + ENTRY)


@broken("photo", "missing.safetensors", advice=CORRECT + "|" + SERVE)
def catalogue_with_a_missing_file(builder: Builder) -> Settings:
    return _toml(builder, ENTRY.replace('"model"', '"missing.safetensors"'))


@broken("drawing", UNET, "lfs", advice=AGAIN, starts=None)
def catalogue_with_one_damaged_model_of_two(builder: Builder) -> Settings:
    (builder.sd("other") / UNET).write_bytes(POINTER)
    return _toml(builder, ENTRY + '[[models]]\nname = "drawing"\nsource = "other"\n')


@broken("models", "IMG2IMG_MODELS_FILE", "folder|directory", advice=SERVE)
def folder_as_the_catalogue(builder: Builder) -> Settings:
    (builder.folder / "models").mkdir()
    return {"MODELS_FILE": builder.folder / "models"}


@broken("no-such.toml", "IMG2IMG_MODELS_FILE", advice=SERVE + "|" + CORRECT)
def missing_catalogue(builder: Builder) -> Settings:
    return {"MODELS_FILE": builder.folder / "no-such.toml"}


@broken("photo", "scheduler", "eulr", advice=CORRECT + "|" + SERVE)
def catalogue_with_a_misspelt_scheduler(builder: Builder) -> Settings:
    return _toml(builder, ENTRY + '[models.defaults]\nscheduler = "eulr"\n')


@broken("photo", "no-such-loras", "lora_dir", advice=CORRECT + "|" + SERVE + "|" + advice("create"))
def catalogue_with_a_missing_lora_folder(builder: Builder) -> Settings:
    return _toml(builder, ENTRY + 'lora_dir = "no-such-loras"\n')
