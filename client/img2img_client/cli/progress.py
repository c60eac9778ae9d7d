"""The live display of a job on a terminal: its status, and a progress bar for every sample."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from img2img_client import events
from img2img_client.cli.program import count
from img2img_client.cli.report import COLOURS, with_reason
from img2img_client.resources import State

log = logging.getLogger("img2img_client")

STAGES = {
    events.Stage.TEXT_ENCODED: "encoding the init image",
    events.Stage.IMAGE_ENCODED: "denoising",
    events.Stage.IMAGE_DECODED: "finishing the image",
    events.Stage.SAFETY_CHECKED: "encoding the image",
}
OTHER_COLUMNS = 36  # width of the other columns: " sample 0 ", " 10/10 " and "seed 4294967295"


class LiveDisplay:
    """A status line with the elapsed time, and one progress bar for each sample."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._status = "connecting"
        self._job_name = ""
        self._end: tuple[str, str] | None = None  # symbol and colour of the end
        self._unfinished: set[int] = set()
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=max(4, min(40, console.width - OTHER_COLUMNS))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[int, TaskID] = {}
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, refresh_per_second=10)
        self._log_handler = _LogHandler(self)

    def __enter__(self) -> Self:
        log.addHandler(self._log_handler)
        log.setLevel(logging.INFO)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = self._end or ("-", "dim")  # The user left before the job ended.
        self._live.transient = not self._job_name  # The request was rejected, so no output remains.
        self._live.stop()
        log.removeHandler(self._log_handler)

    def __rich__(self) -> Group:
        """Called by Live at every refresh."""
        line = Table.grid(padding=(0, 1))
        for is_fixed in (True, True, False, True):  # only the status may be truncated
            line.add_column(no_wrap=is_fixed, ratio=None if is_fixed else 1)
        seconds = time.monotonic() - self._started
        head: Spinner | Text = Text(*self._end) if self._end else self._spinner
        line.add_row(
            head,
            Text(self._job_name, style="bold"),
            Text(self._status, no_wrap=True, overflow="ellipsis"),
            Text(f"{seconds:.1f} s", style="dim"),
        )
        return Group(line, self._bars) if self._tasks else Group(line)

    def note(self, status: str) -> None:
        """Sets the text of the status line."""
        self._status = status

    def show(self, event: events.Event) -> None:
        """Shows one event."""
        self._job_name = event.job_name
        match event:
            case events.Snapshot():
                self._begin(event)
            case events.Queued():
                self.note(queued_text(event))
            case events.Started():
                again = f" (attempt {event.attempt})" if event.attempt > 1 else ""
                self.note(f"encoding the prompt with {event.model} on {event.worker}{again}")
                self._reset_bars(event.stored_samples)
                for sample, steps in enumerate(event.done_steps):
                    if sample in self._tasks:
                        self._bars.update(self._tasks[sample], completed=steps)
            case events.StageFinished():
                self.note(STAGES.get(event.stage, self._status))
                if event.stage is events.Stage.IMAGE_ENCODED:
                    for sample in sorted(self._unfinished):
                        self._task(sample)
            case events.StepFinished():
                self.note("denoising")
                task = self._task(event.sample)
                self._bars.update(task, completed=event.step, total=event.total)
                if event.step == event.total:
                    self.note("decoding")
            case events.SampleFinished():
                self._unfinished.discard(event.sample)
                self._bars.update(self._task(event.sample), note=f"seed {event.seed}")
                if not self._unfinished:
                    self.note("storing")
            case events.SampleStored():
                task = self._task(event.sample)
                note = self._bars.tasks[task].fields["note"]
                self._bars.update(task, note=f"{note}, stored".lstrip(", "))
            case events.StorageWaiting():
                self.note(f"waiting for storage ({event.reason})")
            case events.Ended(job=job):
                succeeded = job.state is State.SUCCEEDED
                self.note("done" if succeeded else str(job.state))
                self._end = ("✓" if succeeded else "✗", COLOURS.get(job.state, "red"))

    def _begin(self, event: events.Snapshot) -> None:
        self._unfinished = set(range(event.job.spec.samples))
        state = "queued" if event.job.state is State.QUEUED else "running"
        self.note(with_reason(state, event.job))

    def _reset_bars(self, stored: tuple[int, ...]) -> None:
        self._unfinished |= set(self._tasks)
        self._unfinished -= set(stored)
        for sample, task in self._tasks.items():
            if sample not in stored:
                self._bars.update(task, completed=0, note="")

    def _task(self, sample: int) -> TaskID:
        if sample not in self._tasks:
            self._tasks[sample] = self._bars.add_task(f"sample {sample}", total=None, note="")
        return self._tasks[sample]


class _LogHandler(logging.Handler):
    """Shows the client's log messages about lost and restored connections."""

    def __init__(self, display: LiveDisplay) -> None:
        super().__init__(logging.INFO)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.note(record.getMessage())


def queued_text(event: events.Queued) -> str:
    """Returns a status, for example "queued again (worker lost), 2 jobs ahead, about 5 s"."""
    parts = [f"queued again ({event.requeue_reason})" if event.requeue_reason else "queued"]
    if event.position >= 0:
        ahead = f"{count(event.position, 'job')} ahead"
        parts.append("next" if event.position == 0 else ahead)
    if event.eta_seconds is not None:
        parts.append(f"about {event.eta_seconds:.0f} s")
    return ", ".join(parts)


@contextmanager
def display() -> Iterator[Callable[[events.Event], None]]:
    """Yields a function that shows an event on stderr. Without a terminal, it shows only why a
    queued job does not proceed.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_reason
        return
    with LiveDisplay(console) as live:
        yield live.show


def _print_reason(event: events.Event) -> None:
    match event:
        case events.Snapshot(job=job) if job.state is State.QUEUED and job.state_reason:
            line = f"{job.name} is {with_reason('queued', job)}. {job.warning}"
            click.echo(line.rstrip(), err=True)
