"""The file with the models of a worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from img2img_server.engine.catalogue import read_catalogue
from img2img_server.setting_checks import mistakes_of
from img2img_server.settings import Settings, SettingsError

FULL = """
[[models]]
name = "photo"
source = "photos/dreamy.safetensors"
base = "../sdxl"
lora_dir = "loras"
dtype = "float16"
max_batch_size = 4

[models.defaults]
scheduler = "dpmpp_2m"
num_inference_steps = 25
guidance_scale = 6
strength = 0.6
native_size = 768

[[models]]
source = "acme/model@v2"

[[models]]
source = "other/model"
"""


def catalogue(folder: Path, text: str, name: str = "models.toml", **changes: object) -> Settings:
    file = folder / name
    file.write_text(text)
    return Settings(models_file=file, **changes)  # type: ignore[arg-type]


def mistakes(folder: Path, text: str, **changes: object) -> list[str]:
    with pytest.raises(SettingsError) as error:
        read_catalogue(catalogue(folder, text, **changes))
    return [mistake.replace(str(folder), "FOLDER") for mistake in error.value.mistakes]


def test_each_model_has_the_settings_of_a_worker_that_serves_only_it(tmp_path: Path) -> None:
    found = read_catalogue(catalogue(tmp_path, FULL, tiny_vae="madebyollin/taesd"))
    photo = found[0].settings
    assert [model.name for model in found] == ["photo", "acme/model", "other/model"]
    assert photo.model == str(tmp_path / "photos/dreamy.safetensors")
    assert (photo.model_name, photo.models_file) == ("photo", None)
    assert (photo.lora_dir, photo.dtype, photo.max_batch_size) == (tmp_path / "loras", "float16", 4)
    assert photo.model_parts_dir == tmp_path / "../sdxl"
    assert found[1].settings.model_parts_dir is None
    assert (photo.default_scheduler, photo.default_num_inference_steps) == ("dpmpp_2m", 25)
    assert (photo.default_guidance_scale, photo.default_strength) == (6, 0.6)
    assert (photo.native_size, photo.tiny_vae) == (768, "madebyollin/taesd")
    assert found[1].settings.model == "acme/model@v2"
    assert found[1].settings.default_num_inference_steps == 0


def test_a_folder_next_to_the_catalogue_comes_before_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "acme" / "model").mkdir(parents=True)
    (model,) = read_catalogue(catalogue(tmp_path, '[[models]]\nsource = "acme/model"\nname = "m"'))
    assert model.settings.model == str(tmp_path / "acme" / "model")


def test_json_has_the_same_content(tmp_path: Path) -> None:
    text = json.dumps({"models": [{"name": "a"}, {"name": "b", "defaults": {"strength": 0.5}}]})
    found = read_catalogue(catalogue(tmp_path, text, "models.json"))
    assert [(model.name, model.settings.model) for model in found] == [("a", ""), ("b", "")]
    assert found[1].settings.default_strength == 0.5


def test_an_entry_without_a_name_has_the_name_of_its_model(tmp_path: Path) -> None:
    (model,) = read_catalogue(catalogue(tmp_path, "[[models]]"))
    assert model.name == "atelier"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "",
            "IMG2IMG_MODELS_FILE: FOLDER/models.toml must have [[models]] with at least one model: "
            "add one",
        ),
        (
            "models = []",
            "IMG2IMG_MODELS_FILE: FOLDER/models.toml must have [[models]] with at least one model: "
            "add one",
        ),
        (
            "[models]\nname = 'a'",
            "IMG2IMG_MODELS_FILE: FOLDER/models.toml must have [[models]] with at least one model: "
            "add one",
        ),
        (
            "[[models]]\nname = 'a'\n[[models]]\nname = 'b'\nstrenght = 1",
            "FOLDER/models.toml: entry b: strenght: there is no such field; there are name, "
            "source, base, defaults, lora_dir, lora_s3_prefix, embeddings_dir, vae_dir, dtype, "
            "max_batch_size, warm_up_sizes, quantization, gguf_file, tiny_vae, compile, "
            "text_encoder_placement: correct it",
        ),
        (
            "[[models]]\nname = 'a'\n[models.defaults]\nstrength = 2",
            "FOLDER/models.toml: entry a: defaults.strength: must be less than or equal to 1",
        ),
        (
            "[[models]]\nname = 'a'\nwarm_up_sizes = 'big'",
            "FOLDER/models.toml: entry a: warm_up_sizes: "
            "must list sizes as WIDTHxHEIGHT, comma separated, such as 512x512, 768x512",
        ),
        (
            "[[models]]\nname = 'a'\n[[models]]\nname = 'a'",
            "IMG2IMG_MODELS_FILE: FOLDER/models.toml: 2 models have the name 'a': give each "
            "a `name` of its own",
        ),
        (
            "[[models]]\nname = 'a'\nlora_dir = 'l'\nquantization = 'int8'",
            "FOLDER/models.toml: entry a: lora_dir: does not work with "
            "`quantization`, which changes how the weights are kept that a LoRA changes",
        ),
        (
            "[[models]]\nsource = 's'\nlora_s3_prefix = 'loras/a'",
            "FOLDER/models.toml: entry s: lora_s3_prefix: has no effect without `lora_dir`",
        ),
        (
            "[[models]]\nname = 'a'\nlora_dir = 'l'\nlora_s3_prefix = 'temp/a'",
            "FOLDER/models.toml: entry a: lora_s3_prefix: must not begin with temp, "
            "whose files the bucket deletes",
        ),
        (
            "[[models]]\nname = 'a'\nlora_dir = 'l'\nlora_s3_prefix = 'loras/a'\n"
            "[[models]]\nname = 'b'\nlora_dir = 'l'\nlora_s3_prefix = 'loras/a/'\n"
            "[[models]]\nname = 'c'\nlora_dir = './l/'\nlora_s3_prefix = 'loras/b'",
            "FOLDER/models.toml: entry c: lora_dir: FOLDER/l has the files of loras/a "
            "(FOLDER/models.toml: entry a): name another folder",
        ),
    ],
    ids=[
        *("empty", "none", "table", "unknown", "range", "sizes", "names", "conflict"),
        *("prefix", "deleted", "shared"),
    ],
)
def test_a_mistake_names_the_entry_and_its_field(tmp_path: Path, text: str, sentence: str) -> None:
    assert mistakes(tmp_path, text) == [sentence]


def test_an_entry_has_the_loras_of_its_own_prefix_only(tmp_path: Path) -> None:
    text = """
    [[models]]
    name = "a"
    lora_s3_prefix = "loras/a"
    [[models]]
    name = "b"
    lora_dir = "own"
    [[models]]
    name = "c"
    [[models]]
    name = "d"
    lora_dir = "copies"
    lora_s3_prefix = "loras/d"
    """
    common = {"lora_dir": tmp_path / "all", "lora_s3_prefix": "loras"}
    found = read_catalogue(catalogue(tmp_path, text, **common))
    assert [(each.settings.lora_dir, each.settings.lora_s3_prefix) for each in found] == [
        (tmp_path / "all/loras/a", "loras/a"),
        (tmp_path / "own", ""),
        (tmp_path / "all", "loras"),
        (tmp_path / "copies", "loras/d"),
    ]


def test_a_setting_for_all_models_keeps_its_name(tmp_path: Path) -> None:
    text = "[[models]]\nname = 'a'\nlora_dir = 'l'"
    assert mistakes(tmp_path, text, quantization="int8") == [
        "FOLDER/models.toml: entry a: lora_dir: does not work with IMG2IMG_QUANTIZATION, "
        "which changes how the weights are kept that a LoRA changes"
    ]


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    text = "[[models]]\nname = ''\ndtype = 'float8'\n[[models]]\nmax_batch_size = 0"
    assert len(mistakes(tmp_path, text)) == 3


def test_a_file_that_is_no_toml_or_missing_is_named(tmp_path: Path) -> None:
    (sentence,) = mistakes(tmp_path, "models = [")
    assert sentence.startswith("IMG2IMG_MODELS_FILE: FOLDER/models.toml is no TOML: ")
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        read_catalogue(Settings(models_file=tmp_path / "absent.toml"))


def test_a_model_and_a_catalogue_cannot_both_be_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="IMG2IMG_MODEL: cannot be used together with IMG2IMG_MOD"):
        Settings(models_file=tmp_path / "m.toml", model="acme/model")


def test_a_folder_that_is_missing_is_an_error_of_the_start(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    text = (
        "[[models]]\nname = 'a'\nlora_dir = 'loras'\n"
        "[[models]]\nname = 'b'\nlora_dir = 'none'\nbase = 'gone'\nsource = 'late.safetensors'"
    )
    found = mistakes_of("doctor", catalogue(tmp_path, text))
    assert [mistake.replace(str(tmp_path), "FOLDER") for mistake in found] == [
        "FOLDER/models.toml: entry b: base: folder FOLDER/gone cannot be read: "
        "No such file or directory: create it, or correct the path",
        "FOLDER/models.toml: entry b: lora_dir: folder FOLDER/none cannot be read: "
        "No such file or directory: create it, or correct the path",
    ]
