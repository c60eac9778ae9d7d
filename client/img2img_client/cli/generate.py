"""`img2img generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from img2img_client.cli.follow import Files, check_output, follow
from img2img_client.cli.session import Seconds, Session, command
from img2img_client.resources import Job


@click.command()
@click.option("--prompt", required=True, help="What the picture shall show.")
@click.option(
    "--init-image",
    required=True,
    metavar="FILE|URL",
    help="The picture to start from: PNG, JPEG or WebP. A URL may be a data URI.",
)
@click.option(
    "--strength",
    type=float,
    help="How strongly the image is changed: 0.0 to 1.0. Default: the model's, see "
    "`img2img capabilities`.",
)
@click.option(
    "--seed", type=int, help="The same seed gives the same image. Default, and -1: drawn."
)
@click.option("--samples", type=int, help="Number of pictures. Default 1.")
@click.option("--width", type=int, help="Pixels, a multiple of 8. Default 512.")
@click.option("--height", type=int, help="Pixels, a multiple of 8. Default 512.")
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Where the picture goes: .png, .jpg or .webp. Several: out-0.png, out-1.png ... "
    "Default: JOB.png.",
)
@click.option("--negative-prompt", help="What it shall not show; needs --guidance above 1.")
@click.option("--steps", "num_inference_steps", type=int, help="Of which strength x steps run.")
@click.option("--guidance", "guidance_scale", type=float, help="How closely to follow the prompt.")
@click.option("--scheduler", help="Sampler by name, see `img2img capabilities`.")
@click.option("--lora", help="LoRA by name, see `img2img capabilities --json`.")
@click.option("--lora-scale", type=float, help="How much of the LoRA. Default 1.0.")
@click.option("--model", help="Model by name, see `img2img capabilities`.")
@click.option(
    "--preview-every",
    "preview_interval_steps",
    metavar="STEPS",
    type=int,
    help="Save a small PATH-preview.jpg every this many steps.",
)
@click.option("--no-safety-checker", is_flag=True, help="Do not check the pictures.")
@click.option("--enhance-prompt", is_flag=True, help="Let the service improve the prompt.")
@click.option("--temp", is_flag=True, help="Store the files for 24 hours only.")
@click.option("--base64", is_flag=True, help="Store the files as base64 text.")
@click.option("--webhook", metavar="URL", help="Gets one POST when the job has ended.")
@click.option("--track-id", help="Your own reference.")
@click.option("--request-id", metavar="UUID", help="The same id gives the same job again.")
@click.option("--batch", is_flag=True, help="Let realtime jobs go first.")
@click.option("--detach", is_flag=True, help="Queue the job, print its name and return.")
@click.option(
    "--timeout",
    "timeout_seconds",
    metavar="SECONDS",
    type=Seconds(),
    help="Give up after that, and cancel the job.",
)
@command
def generate(
    session: Session,
    *,
    prompt: str,
    init_image: str,
    output: Path | None,
    detach: bool,
    batch: bool,
    no_safety_checker: bool,
    request_id: str | None,
    timeout_seconds: float | None,
    **options: Any,
) -> None:
    """Turn a picture into new ones, saved and linked. Ctrl-C cancels the job."""
    options["output_format"] = check_output(output)
    options["lane"] = "batch" if batch else None
    options["safety_checker"] = False if no_safety_checker else None
    if detach:
        if timeout_seconds is not None:
            raise click.UsageError("--timeout has no meaning with --detach")
        job = session.client.create(prompt, init_image, request_id=request_id, **options)
        session.answer(job, lambda: _queued(job, output))
        return
    stream = session.client.stream(
        prompt, init_image, request_id=request_id, timeout_seconds=timeout_seconds, **options
    )
    files = Files(output, by_id=True)
    follow(session, stream, files, ours=True, timeout_seconds=timeout_seconds)


def _queued(job: Job, output: Path | None) -> None:
    target = output or f"{job.id}.png"
    click.echo(f"{job.name} is queued; follow it: img2img watch {job.id} --output {target}")
    if job.warning:
        click.echo(f"Warning: {job.warning}")
