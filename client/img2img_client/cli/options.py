"""The options that describe a job, for `img2img generate` and `estimate`, and its init image."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])
STDIO = "-"  # stdin as the init image, stdout as the output


def _read_annotations(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> dict[str, str] | None:
    """Raises click.BadParameter for an annotation without an equals sign or a name twice."""
    read: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise click.BadParameter(f"{each!r} is not NAME=VALUE.")
        if name in read:
            raise click.BadParameter(f"{name!r} is given twice.")
        read[name] = value
    return read or None


def _read_loras(
    _context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]
) -> list[tuple[str, float]] | None:
    """Reads NAME:SCALE or NAME. A colon that no number follows belongs to the name."""
    read: list[tuple[str, float]] = []
    for each in given:
        if not each.strip(":"):
            raise click.BadParameter(f"{each!r} is not NAME or NAME:SCALE.")
        name, _, scale = each.rpartition(":")
        try:
            read.append((name, float(scale)) if name else (each, 1.0))
        except ValueError:
            read.append((each, 1.0))
    return read or None


def _complete_file(*_: object) -> list[CompletionItem]:
    return [CompletionItem("", type="file")]


def init_image_option(*, required: bool) -> Callable[[F], F]:
    """Returns the decorator that adds --init-image."""
    return click.option(
        "--init-image",
        required=required,
        metavar="FILE|URL|-",
        shell_complete=_complete_file,
        help="The image to start from: a PNG, JPEG or WebP file, an http(s) URL, a data URI, or - "
        "for a file on stdin.",
    )


def read_init_image(given: str) -> str | bytes:
    """Returns the init image of the command line; reads it from stdin if it is -.

    Raises:
        click.BadParameter: stdin has no file.
    """
    if given != STDIO:
        return given
    stdin = sys.stdin.buffer
    hint = "--init-image"
    if stdin.isatty():
        text = "- reads a file from stdin, which is a terminal: use < FILE or a pipe"
        raise click.BadParameter(text, param_hint=hint)
    data = stdin.read()
    if not data:
        raise click.BadParameter("stdin is empty", param_hint=hint)
    return data


JOB_OPTIONS = (
    click.option(
        "--strength",
        type=float,
        help="How strongly the init image is changed: 0.0 (not at all) to 1.0 (completely). "
        "Default: the model's, see `img2img capabilities`.",
    ),
    click.option(
        "--noise-level",
        "strength_mode",
        flag_value="noise_level",
        default=None,
        help="Read strength as the share of noise at the first step, not as the share of steps.",
    ),
    click.option(
        "--seed",
        type=int,
        help="The same seed gives the same images. Default, and -1: a random seed.",
    ),
    click.option("--samples", type=int, help="Number of images. Default: 1."),
    click.option(
        "--width", type=int, help="Width in pixels. Default: the native area of the model."
    ),
    click.option(
        "--height",
        type=int,
        help="Height in pixels. Default: at the aspect ratio of the init image.",
    ),
    click.option(
        "--output-quality",
        type=int,
        help="Quality of JPEG and WebP files, 1 to 100. Default: 95 and 90.",
    ),
    click.option(
        "--negative-prompt", help="Description of things to avoid. Needs --guidance above 1."
    ),
    click.option(
        "--steps",
        "num_inference_steps",
        type=int,
        help="Denoising steps of the full schedule, of which strength x steps run. Default: the "
        "model's.",
    ),
    click.option(
        "--guidance",
        "guidance_scale",
        type=float,
        help="How closely the image follows the prompt; 1.0 and below turn guidance off. Default: "
        "the model's.",
    ),
    click.option(
        "--true-cfg-scale",
        type=float,
        help="Guidance with the negative prompt in models such as FLUX.1; 1.0 and below turn it "
        "off. Default: off.",
    ),
    click.option("--scheduler", help="Name of the scheduler, see `img2img capabilities`."),
    click.option(
        "--lora",
        "loras",
        metavar="NAME[:SCALE]",
        multiple=True,
        callback=_read_loras,
        help="A LoRA, see `img2img capabilities --json`, and the scale of its change, such as "
        "ink:0.8. Default scale: 1.0; a negative one subtracts the change. Can be given several "
        "times.",
    ),
    click.option("--model", help="Name of the model, see `img2img capabilities`."),
    click.option(
        "--preview-every",
        "preview_interval_steps",
        metavar="STEPS",
        type=int,
        help="Save a small preview, such as out-preview.jpg, after every STEPS steps.",
    ),
    click.option(
        "--no-safety-checker",
        "safety_checker",
        flag_value=False,
        default=None,
        help="Do not check the images for unsafe content.",
    ),
    click.option("--enhance-prompt", is_flag=True, help="Let the service rewrite the prompt."),
    click.option("--temp", is_flag=True, help="Store the images for 24 hours only."),
    click.option("--base64", is_flag=True, help="Store the images as base64 text files."),
    click.option(
        "--annotation",
        "annotations",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_read_annotations,
        help="Your own note on the job, returned unchanged. Can be given several times.",
    ),
    click.option(
        "--allow-partial",
        is_flag=True,
        help="Succeed with the images that could be stored if others fail.",
    ),
    click.option(
        "--prompt-weights",
        is_flag=True,
        help='Read "(words:1.3)", "[words]" and BREAK in the prompts as weights and chunks.',
    ),
    click.option(
        "--clip-skip",
        type=int,
        help="Skip so many of the last layers of the CLIP text encoders. Default: 0.",
    ),
    click.option(
        "--webhook", metavar="URL", help="URL that receives a POST when the job has ended."
    ),
    click.option("--track-id", help="Your own reference for the job."),
    click.option(
        "--batch", "lane", flag_value="batch", default=None, help="Run after all realtime jobs."
    ),
)


def job_options(function: F) -> F:
    """Decorates a command: adds the options of JOB_OPTIONS."""
    for option in reversed(JOB_OPTIONS):
        function = option(function)
    return function
