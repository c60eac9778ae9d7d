"""The text that the commands print for a person, on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from img2img_client.cli.program import count
from img2img_client.resources import (
    Capabilities,
    Estimate,
    Job,
    Limits,
    Model,
    ModelState,
    State,
    Timings,
)
from img2img_client.spec import StrengthMode

# The descriptions of the stages of Timings.
STAGES = {
    "queue": "waiting for a worker",
    "held": "waiting on the worker for its device",
    "fetch": "downloading and checking the init image, before acceptance",
    "prepare": "preparing the init image",
    "encode": "prompt and init image to latents",
    "denoise": "denoising steps",
    "paused": "between the steps, while other jobs ran",
    "decode": "latents to pixels",
    "safety": "safety check",
    "image_encode": "encoding the inline images",
    "upload": "encoding and storing the files",
    "engine": "from the first encode to the last decode",
    "total": "from the request to the end",
}
PIPE_COLUMNS = 200  # the width without a terminal
# If the terminal is narrow, the last columns are hidden first.
JOB_COLUMNS_BY_USE = ("state", "prompt", "created", "size", "model")
MIN_PROMPT_WIDTH, GAP = 12, 2
COLOURS = {State.SUCCEEDED: "green", State.FAILED: "red", State.CANCELLED: "yellow"}


def show_ended(
    job: Job, files: Mapping[int, Path], previews: Mapping[int, Path], *, err: bool = False
) -> None:
    """Prints the paths, links and seeds of an ended job, and its timings; on stderr with `err`."""
    for sample in job.samples:
        path = files.get(sample.index)
        size = f"{job.spec.width}x{job.spec.height}"
        blank = ", replaced by the safety checker" if sample.nsfw else ""
        click.echo(
            f"{path or f'sample {sample.index}'}  {size}, seed {sample.seed}{blank}", err=err
        )
        if sample.error:
            click.echo(f"  failed ({sample.error.reason}): {sample.error.message}", err=err)
        if sample.index in previews:
            click.echo(f"  preview {previews[sample.index]}", err=err)
        if sample.url:
            click.echo(f"  {sample.url}", err=err)
    if job.warning:
        click.echo(f"Warning: {job.warning}", err=err)
    if job.state is not State.SUCCEEDED:
        reason = f" ({job.error.reason}): {job.error.message}" if job.error else ""
        click.echo(f"Error: {job.name} {job.state}{reason}", err=True)
    if job.timings is not None and job.state is State.SUCCEEDED:
        head = f"\n{job.name} with {job.spec.model} on {job.device}, worker {job.worker}"
        click.echo(head, err=err)
        _print(timings_table(job.timings), err=err)


def timings_table(timings: Timings) -> Table:
    """Returns a row for each stage that took time: milliseconds and the share of the total."""
    table = _table("stage", "ms", "share", "")
    for column in (1, 2):
        table.columns[column].justify = "right"
    for name, seconds in asdict(timings).items():
        stage = name.removesuffix("_seconds")
        if stage == name or not seconds:  # The value is a count, or the stage took no time.
            continue
        share = seconds / timings.total_seconds if timings.total_seconds else 0.0
        text = STAGES.get(stage, "")
        text += f", {timings.steps} in all" if stage == "denoise" else ""
        table.add_row(stage.replace("_", " "), f"{seconds * 1000:.0f}", f"{share:.0%}", text)
    return table


def show_job(job: Job) -> None:
    """Prints one job in detail."""
    table = Table.grid(padding=(0, 2))
    rows = {
        "job": job.name,
        "state": with_reason(job.state, job),
        "prompt": job.spec.prompt,
        "model": job.spec.model,
        "size": f"{job.spec.width}x{job.spec.height}, " + count(job.spec.samples, "sample"),
        "strength": f"{job.spec.strength:g}",
        "seed": str(job.spec.seed),
        "created": _time(job.create_time),
        "started": _time(job.start_time),
        "ended": _time(job.end_time),
        "expires": _time(job.expire_time),
        "expected": "" if job.eta_seconds is None else f"in about {job.eta_seconds:.0f} s",
        "worker": " on ".join(part for part in (job.worker, job.device) if part),
        "device time": f"{job.device_seconds:.2f} s" if job.device_seconds else "",
        "track id": job.spec.track_id,
        "webhook": ": ".join(part for part in (job.webhook_status, job.webhook_error) if part),
        "error": f"{job.error.reason}: {job.error.message}" if job.error else "",
        "warning": job.warning,
    }
    for name, text in rows.items():
        if text:
            style = COLOURS.get(job.state, "cyan") if name == "state" else ""
            table.add_row(Text(name, style="dim"), Text(text, style=style))
    table.columns[1].min_width = len(job.name)  # A narrow terminal must not cut the name.
    _console().print(table, crop=False)
    for url in [sample.url for sample in job.samples if sample.url]:
        click.echo(url)
    if job.timings is not None and job.state.is_terminal:
        _print(timings_table(job.timings))


def show_estimate(found: Estimate) -> None:
    """Prints the time and the price of a job that was not created."""
    spec = found.spec
    unknown = "unknown until a worker has measured the model"
    device = f"{found.device_seconds:.2f} s" if found.device_seconds else unknown
    wait = "unknown" if found.wait_seconds is None else f"about {found.wait_seconds:.0f} s"
    end = "unknown" if found.eta_seconds is None else f"in about {found.eta_seconds:.0f} s"
    rows = {
        "model": spec.model,
        "size": f"{spec.width}x{spec.height}, " + count(spec.samples, "sample"),
        "steps": _estimated_steps(found),
        "device time": device,
        "wait": f"{wait}, {count(found.position, 'job')} ahead",
        "expected": end,
        "price": f"{found.price:.6g} {found.currency}" if found.currency else "",
        "warning": found.warning,
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, style="dim"), Text(text))
    _print(table)


def _estimated_steps(found: Estimate) -> str:
    """Returns the number of steps that would run for each sample, or "" if it is not known."""
    if found.denoising_steps is None:
        return ""
    is_exact = found.spec.strength_mode is not StrengthMode.NOISE_LEVEL
    return f"{found.denoising_steps}" if is_exact else f"about {found.denoising_steps}"


def with_reason(state: str, job: Job) -> str:
    """Returns the state with the reason why the job does not proceed, if there is one."""
    reason = job.state_reason.replace("_", " ").lower()
    return f"{state} ({reason})" if reason else state


def show_jobs(jobs: Sequence[Job]) -> None:
    """Prints a line for each job, with the columns that fit the terminal; never cuts the id."""
    if not jobs:
        click.echo("no jobs")
        return
    console, rows = _console(), [_row(job) for job in jobs]
    widths = {name: max(len(name), *(row[name].cell_len for row in rows)) for name in rows[0]}
    widths["prompt"] = MIN_PROMPT_WIDTH
    shown, left = {"job"}, console.width - widths["job"]
    for name in JOB_COLUMNS_BY_USE:
        left -= widths[name] + GAP
        if left < 0:
            break
        shown.add(name)
    table = _table(*(name for name in widths if name in shown))
    for column in table.columns:
        if column.header != "prompt":  # only the prompt may be truncated
            column.no_wrap, column.min_width = True, widths[str(column.header)]
    for row in rows:
        table.add_row(*(text for name, text in row.items() if name in shown))
    console.print(table, crop=False)


def _row(job: Job) -> dict[str, Text]:
    """Returns the columns of one job, in order."""
    samples = f" x{job.spec.samples}" if job.spec.samples > 1 else ""
    return {
        "job": Text(str(job.id)),
        "state": Text(job.state, style=COLOURS.get(job.state, "cyan")),
        "created": Text(_time(job.create_time)),
        "model": Text(job.spec.model),
        "size": Text(f"{job.spec.width}x{job.spec.height}{samples}"),
        "prompt": Text(job.spec.prompt.replace("\n", " "), no_wrap=True, overflow="ellipsis"),
    }


def show_capabilities(found: Capabilities) -> None:
    """Prints the models and the limits."""
    click.echo(f"server {found.server_version}")
    names = ("model", "family", "workers", "device", "size", "steps", "strength", "guidance")
    table = _table(*names)
    table.columns[0].no_wrap = True  # It is the value of --model.
    for model in found.models:
        table.add_row(
            model.name,
            model.family,
            _workers(model),
            model.device,
            _sizes(model, found.limits),
            _steps(model),
            f"{model.default_strength:g}",
            f"{model.default_guidance_scale:g}",
        )
    _print(table)
    for model in found.models:
        click.echo(f"\nschedulers of {model.name}: {', '.join(model.schedulers)}")
        if model.loras:
            click.echo(f"LoRAs of {model.name}: {', '.join(model.loras)}")
    click.echo("\nlimits of the service; those of a model can be lower")
    _print(_limits_table(found.limits))


def _workers(model: Model) -> str:
    """Returns the number of workers, and whether one of them must load the model first."""
    is_cold = model.state is ModelState.COLD
    return f"{model.workers} (cold)" if is_cold else str(model.workers)


def _sizes(model: Model, limits: Limits) -> str:
    """Returns the model's native size, and its side multiple if it is larger than the service's."""
    multiple = model.side_multiple
    text = str(model.native_size)
    return f"{text} (multiples of {multiple})" if multiple > limits.side_multiple else text


def _steps(model: Model) -> str:
    most = model.max_num_inference_steps  # 0: the service is too old to report the limit
    return f"{model.default_num_inference_steps}" + (f" (at most {most})" if most else "")


def _limits_table(limits: Limits) -> Table:
    """Returns a row for each limit that the service reports, under its name in the API."""
    table = _table("limit", "")
    for name, value in asdict(limits).items():
        if value or name.startswith("min_"):
            text = ", ".join(value) if isinstance(value, tuple) else f"{value:,.14g}"
            text = f"{value:,}" if isinstance(value, int) else text
            table.add_row(name.replace("_", " "), text)
    return table


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)


def _time(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _print(table: Table, *, err: bool = False) -> None:
    _console(err).print(table)


def _console(err: bool = False) -> Console:
    console = Console(highlight=False, stderr=err)
    if console.is_terminal:
        return console
    return Console(highlight=False, stderr=err, width=PIPE_COLUMNS)
