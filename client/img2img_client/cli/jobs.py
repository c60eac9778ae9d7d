"""`img2img generate`, `watch`, `get`, `list`, `cancel`, `redeliver` and `capabilities`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click

from img2img_client.cli.follow import Files, cancel_text, check_output, follow
from img2img_client.cli.program import job_facts
from img2img_client.cli.session import Seconds, Session, command, read_job
from img2img_client.resources import Job, State

STATES = [state.value for state in State if state is not State.UNSPECIFIED]


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
        name, _, scale = each.rpartition(":")
        try:
            read.append((name, float(scale)) if name else (each, 1.0))
        except ValueError:
            read.append((each, 1.0))
    return read or None


@click.command()
@click.option("--prompt", required=True, help="Description of the image.")
@click.option(
    "--init-image",
    required=True,
    metavar="FILE|URL",
    help="The image to start from: a PNG, JPEG or WebP file, an http(s) URL or a data URI.",
)
@click.option(
    "--strength",
    type=float,
    help="How strongly the init image is changed: 0.0 (not at all) to 1.0 (completely). "
    "Default: the model's, see `img2img capabilities`.",
)
@click.option(
    "--noise-level",
    "strength_mode",
    flag_value="noise_level",
    default=None,
    help="Read strength as the share of noise at the first step, not as the share of steps.",
)
@click.option(
    "--seed", type=int, help="The same seed gives the same images. Default, and -1: a random seed."
)
@click.option("--samples", type=int, help="Number of images. Default: 1.")
@click.option("--width", type=int, help="Width in pixels. Default: the native area of the model.")
@click.option(
    "--height", type=int, help="Height in pixels. Default: at the aspect ratio of the init image."
)
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="File of the image, such as out.png, out.jpg or out.webp. Several samples are saved as "
    "out-0.png, out-1.png and so on. Default: the id of the job, such as 10000001.png.",
)
@click.option(
    "--output-quality",
    type=int,
    help="Quality of JPEG and WebP files, 1 to 100. Default: 95 and 90.",
)
@click.option("--negative-prompt", help="Description of things to avoid. Needs --guidance above 1.")
@click.option(
    "--steps",
    "num_inference_steps",
    type=int,
    help="Denoising steps of the full schedule, of which strength x steps run. Default: the "
    "model's.",
)
@click.option(
    "--guidance",
    "guidance_scale",
    type=float,
    help="How closely the image follows the prompt; 1.0 and below turn guidance off. Default: the "
    "model's.",
)
@click.option(
    "--true-cfg-scale",
    type=float,
    help="Guidance with the negative prompt in models such as FLUX.1; 1.0 and below turn it off. "
    "Default: off.",
)
@click.option("--scheduler", help="Name of the scheduler, see `img2img capabilities`.")
@click.option(
    "--lora",
    "loras",
    metavar="NAME[:SCALE]",
    multiple=True,
    callback=_read_loras,
    help="A LoRA, see `img2img capabilities --json`, and the scale of its change, such as ink:0.8. "
    "Default scale: 1.0. Can be given several times.",
)
@click.option("--model", help="Name of the model, see `img2img capabilities`.")
@click.option(
    "--preview-every",
    "preview_interval_steps",
    metavar="STEPS",
    type=int,
    help="Save a small preview, such as out-preview.jpg, after every STEPS steps.",
)
@click.option(
    "--no-safety-checker",
    "safety_checker",
    flag_value=False,
    default=None,
    help="Do not check the images for unsafe content.",
)
@click.option("--enhance-prompt", is_flag=True, help="Let the service rewrite the prompt.")
@click.option("--temp", is_flag=True, help="Store the images for 24 hours only.")
@click.option("--base64", is_flag=True, help="Store the images as base64 text files.")
@click.option(
    "--annotation",
    "annotations",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_read_annotations,
    help="Your own note on the job, returned unchanged. Can be given several times.",
)
@click.option(
    "--allow-partial",
    is_flag=True,
    help="Succeed with the images that could be stored if others fail.",
)
@click.option(
    "--prompt-weights",
    is_flag=True,
    help='Read "(words:1.3)", "[words]" and BREAK in the prompts as weights and chunks.',
)
@click.option(
    "--clip-skip",
    type=int,
    help="Skip so many of the last layers of the CLIP text encoders. Default: 0.",
)
@click.option("--webhook", metavar="URL", help="URL that receives a POST when the job has ended.")
@click.option("--track-id", help="Your own reference for the job.")
@click.option(
    "--request-id", metavar="UUID", help="A request with the same id returns the same job."
)
@click.option(
    "--batch", "lane", flag_value="batch", default=None, help="Run after all realtime jobs."
)
@click.option("--detach", is_flag=True, help="Queue the job, print its name and return.")
@click.option(
    "--timeout",
    "timeout_seconds",
    metavar="SECONDS",
    type=Seconds(),
    help="Cancel the job if it has not ended after this time.",
)
@command
def generate(
    session: Session,
    *,
    prompt: str,
    init_image: str,
    output: Path | None,
    detach: bool,
    request_id: str | None,
    timeout_seconds: float | None,
    **options: Any,
) -> None:
    """Generate images from an init image and a prompt, and save them. Ctrl-C cancels the job."""
    options |= {"output_format": check_output(output), "request_id": request_id}
    if detach:
        if timeout_seconds is not None:
            raise click.UsageError("--timeout cannot be combined with --detach")
        job = session.client.create(prompt, init_image, **options)
        session.answer(job, lambda: _queued(job, output))
        return
    stream = session.client.stream(prompt, init_image, timeout_seconds=timeout_seconds, **options)
    files = Files(output, by_id=True)
    follow(session, stream, files, ours=True, timeout_seconds=timeout_seconds)


def _queued(job: Job, output: Path | None) -> None:
    target = output or f"{job.id}.png"
    click.echo(f"{job.name} is queued; follow it with: img2img watch {job.id} --output {target}")
    if job.warning:
        click.echo(f"Warning: {job.warning}")


@click.command()
@click.argument("job", callback=read_job)
@click.option(
    "--after",
    "after",
    metavar="NUMBER",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    help="Skip the events up to this sequence number.",
)
@click.option(
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Save the images to this file. Its suffix must match the format of the job's images. "
    "Default: save nothing.",
)
@command
def watch(session: Session, *, job: str, after: int, output: Path | None) -> None:
    """Follow a job to its end. Ctrl-C leaves the job running."""
    check_output(output)
    stream = session.client.watch(job, after_sequence=after)
    follow(session, stream, Files(output), ours=False)


@click.command()
@click.argument("job", callback=read_job)
@command
def get(session: Session, *, job: str) -> None:
    """Show the current record of a job."""
    from img2img_client.cli.report import show_job

    found = session.client.get(job)
    session.answer(found, lambda: show_job(found))


@click.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="List only jobs in this state. May be repeated.",
)
@click.option(
    "--limit",
    metavar="NUMBER",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Maximum number of jobs.",
)
@click.option("--request-id", metavar="UUID", help="List only the job of this request.")
@command
def list_jobs(
    session: Session, *, states: tuple[str, ...], limit: int, request_id: str | None
) -> None:
    """List your jobs, newest first."""
    from img2img_client.cli.report import show_jobs

    pages = session.client.list(*states, page_size=min(limit, 100), request_id=request_id or "")
    found = list(itertools.islice(pages, limit))
    session.answer({"jobs": [job_facts(job) for job in found]}, lambda: show_jobs(found))


@click.command()
@click.argument("job", callback=read_job)
@command
def cancel(session: Session, *, job: str) -> None:
    """Cancel a job: a queued job at once, a running job at its next step."""
    found = session.client.cancel(job)
    session.answer(found, lambda: click.echo(cancel_text(found)))


@click.command()
@click.argument("job", callback=read_job)
@command
def redeliver(session: Session, *, job: str) -> None:
    """Send the webhook of an ended job again."""
    found = session.client.redeliver_webhook(job)
    session.answer(found, lambda: click.echo(f"{found.name}: the webhook will be sent again"))


@click.command()
@command
def capabilities(session: Session) -> None:
    """Show the models and the limits of the service."""
    from img2img_client.cli.report import show_capabilities

    found = session.client.capabilities()
    session.answer(found, lambda: show_capabilities(found))
