"""Good models in the wrong place, or settings that name something near them."""

from __future__ import annotations

import shutil
import tarfile

from tests.doctor_forms.forms import (
    AGAIN,
    ALLOW,
    CORRECT,
    SERVE,
    UNET,
    UNPACK,
    Builder,
    Settings,
    advice,
    broken,
    lora,
)

RENAME = advice("rename", "move", "call")


@broken("outer/stable-diffusion-v1-5", advice=SERVE)
def folder_one_level_too_deep(builder: Builder) -> Settings:
    builder.sd("outer/stable-diffusion-v1-5")
    return {"MODEL": builder.folder / "outer"}


@broken("snapshots/0123456789abcdef", advice=SERVE)
def repository_folder_of_the_hub_cache(builder: Builder) -> Settings:
    outer = builder.folder / "models--acme--painter"
    builder.sd("models--acme--painter/snapshots/0123456789abcdef")
    for name in ("blobs", "refs"):
        (outer / name).mkdir()
    (outer / "refs/main").write_text("0123456789abcdef")
    return {"MODEL": outer}


@broken("model/unet", "part|parent|whole model|model_index.json", advice=SERVE)
def part_of_a_model(builder: Builder) -> Settings:
    return {"MODEL": builder.sd() / "unet"}


@broken("model_index.json", "folder|directory", advice=SERVE)
def index_file_of_a_model(builder: Builder) -> Settings:
    return {"MODEL": builder.sd() / "model_index.json"}


@broken("nothing-here", "empty|no files|has no", advice=AGAIN + "|" + SERVE)
def empty_folder(builder: Builder) -> Settings:
    (builder.folder / "nothing-here").mkdir()
    return {"MODEL": builder.folder / "nothing-here"}


@broken("dreamy.safetensors", "folder|directory|empty", advice=AGAIN + "|" + advice("mount"))
def folder_that_docker_made_for_a_missing_file(builder: Builder) -> Settings:
    (builder.folder / "dreamy.safetensors").mkdir()
    return {"MODEL": builder.folder / "dreamy.safetensors"}


@broken("no-such-model", "no|not", advice=SERVE + "|" + advice("correct", "check"))
def missing_folder(builder: Builder) -> Settings:
    return {"MODEL": builder.folder / "no-such-model"}


@broken("no-such.safetensors", "no|not", advice=SERVE + "|" + advice("correct", "check"))
def missing_file(builder: Builder) -> Settings:
    return {"MODEL": builder.folder / "no-such.safetensors"}


@broken("~/models/dreamy", "home|absolute|shell", advice=advice("write", "set", "use", "name"))
def tilde_that_no_shell_replaced(builder: Builder) -> Settings:
    return {"MODEL": "~/models/dreamy"}


@broken("model", "quot", advice=CORRECT)
def path_in_quotes_of_an_env_file(builder: Builder) -> Settings:
    return {"MODEL": f'"{builder.sd()}"'}


@broken(r"C:\\+models\\+dreamy", "path|Windows|backslash", advice=SERVE + "|" + CORRECT)
def path_of_another_system(builder: Builder) -> Settings:
    return {"MODEL": r"C:\models\dreamy"}


@broken("https://huggingface.co/acme/painter", "address|URL|hub id", "acme/painter", advice=SERVE)
def page_of_a_model_at_the_hub(builder: Builder) -> Settings:
    return {"MODEL": "https://huggingface.co/acme/painter"}


@broken("https://civitai.example/models/4384", "address|URL", advice=SERVE)
def page_of_a_model_site(builder: Builder) -> Settings:
    return {"MODEL": "https://civitai.example/models/4384"}


@broken("dreamy.safetensors", "other.safetensors", advice=SERVE)
def two_checkpoints_in_a_folder(builder: Builder) -> Settings:
    builder.single("checkpoints/dreamy.safetensors")
    shutil.copy(
        builder.folder / "checkpoints/dreamy.safetensors",
        builder.folder / "checkpoints/other.safetensors",
    )
    return {"MODEL": builder.folder / "checkpoints"}


@broken("checkpoints/dreamy.safetensors", advice=SERVE)
def one_checkpoint_in_a_folder(builder: Builder) -> Settings:
    builder.single("checkpoints/dreamy.safetensors")
    return {"MODEL": builder.folder / "checkpoints"}


@broken("model.zip", advice=UNPACK)
def zip_of_a_folder(builder: Builder) -> Settings:
    shutil.make_archive(str(builder.folder / "model"), "zip", builder.sd("dreamy"))
    return {"MODEL": builder.folder / "model.zip"}


@broken("model.tar.gz", advice=UNPACK)
def tar_of_a_folder(builder: Builder) -> Settings:
    file = builder.folder / "model.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.add(builder.sd("dreamy"), "dreamy")
    return {"MODEL": file}


@broken("dreamy.zip", advice=UNPACK)
def folder_with_a_zip(builder: Builder) -> Settings:
    (builder.folder / "downloads").mkdir()
    shutil.make_archive(str(builder.folder / "downloads/dreamy"), "zip", builder.sd("dreamy"))
    return {"MODEL": builder.folder / "downloads"}


@broken("VAE", "vae", advice=RENAME)
def part_in_upper_case(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "vae").rename(model / "VAE")
    return {"MODEL": model}


@broken("Model_Index.json", "model_index.json", advice=RENAME)
def index_in_upper_case(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "model_index.json").rename(model / "Model_Index.json")
    return {"MODEL": model}


@broken("diffusion_pytorch_model.safetensors", r"\(1\)|unet", advice=RENAME + "|" + AGAIN)
def weights_that_a_browser_renamed(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).rename(model / "unet/diffusion_pytorch_model (1).safetensors")
    return {"MODEL": model}


@broken("model_index.json", "missing|no|lacks", advice=AGAIN)
def no_index(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "model_index.json").unlink()
    return {"MODEL": model}


@broken("vae", "missing|no|lacks", advice=AGAIN)
def no_autoencoder(builder: Builder) -> Settings:
    model = builder.sd()
    shutil.rmtree(model / "vae")
    return {"MODEL": model}


@broken("scheduler", "missing|no|lacks", advice=AGAIN)
def no_scheduler(builder: Builder) -> Settings:
    model = builder.sd()
    shutil.rmtree(model / "scheduler")
    return {"MODEL": model}


@broken("unet/unet", advice=RENAME + "|" + AGAIN)
def part_copied_into_itself(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "unet").rename(builder.folder / "unet")
    (model / "unet").mkdir()
    (builder.folder / "unet").rename(model / "unet/unet")
    return {"MODEL": model}


@broken("loras", "LoRA", advice=SERVE)
def folder_of_loras(builder: Builder) -> Settings:
    builder.tensors("loras/style.safetensors", lora(16))
    return {"MODEL": builder.folder / "loras"}


@broken(UNET, "permission|may not|denied|not allowed", advice=ALLOW)
def unreadable_weights(builder: Builder) -> Settings:
    model = builder.sd()
    (model / UNET).chmod(0)
    return {"MODEL": model}


@broken("text_encoder", "permission|may not|denied|not allowed", advice=ALLOW)
def unreadable_part(builder: Builder) -> Settings:
    model = builder.sd()
    (model / "text_encoder").chmod(0)
    return {"MODEL": model}


@broken("model", "permission|may not|denied|not allowed", advice=ALLOW)
def unreadable_model(builder: Builder) -> Settings:
    model = builder.sd()
    model.chmod(0)
    return {"MODEL": model}


@broken("style.safetensors", "permission|may not|denied|not allowed", advice=ALLOW, starts=True)
def unreadable_lora(builder: Builder) -> Settings:
    builder.tensors("loras/style.safetensors", lora(16)).chmod(0)
    return {"MODEL": builder.sd(), "LORA_DIR": builder.folder / "loras"}
