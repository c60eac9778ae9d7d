"""The live display of a job on a terminal: what happens now, and a bar for every sample."""

from __future__ import annotations

import logging
import time
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from img2img_client import events
from img2img_client.resources import State

log = logging.getLogger("img2img_client")

ENDS = {
    events.Succeeded: ("✓", "green", "done"),
    events.Failed: ("✗", "red", "failed"),
    events.Cancelled: ("✗", "yellow", "cancelled"),
}
STAGES = {
    events.Stage.TEXT_ENCODED: "encoding the picture",
    events.Stage.IMAGE_ENCODED: "denoising",
}


BESIDE_THE_BAR = 36  # columns: "  sample 0 ", " 10/10 " and "seed 4294967295"


class Display(Protocol):
    """Shows events as they come."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def show(self, event: events.Event) -> None:
        """Shows one event."""
        ...


class NoDisplay:
    """Where nobody looks: no terminal."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, event: events.Event) -> None:
        """Shows nothing."""


class LiveDisplay:
    """A status line with the elapsed time and one bar a sample, on stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._status = "connecting"
        self._job_name = ""
        self._end: tuple[str, str] | None = None  # symbol and colour
        self._unfinished: set[int] = set()
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=max(4, min(40, console.width - BESIDE_THE_BAR))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[int, TaskID] = {}
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, refresh_per_second=10)
        self._trouble = _Trouble(self)

    def __enter__(self) -> Self:
        log.addHandler(self._trouble)
        log.setLevel(logging.INFO)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = self._end or ("-", "dim")  # left before the job's end
        self._live.transient = not self._job_name  # refused: nothing worth keeping
        self._live.stop()
        log.removeHandler(self._trouble)

    def __rich__(self) -> Group:
        """Called by Live at every refresh."""
        line = Table.grid(padding=(0, 1))
        for is_fixed in (True, True, False, True):  # only the status gives way
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
                self._reset_bars()
            case events.StageFinished():
                self.note(STAGES.get(event.stage, self._status))
                if event.stage is events.Stage.IMAGE_ENCODED:
                    for sample in sorted(self._unfinished):
                        self._task(sample)
            case events.StepFinished():
                self.note("denoising")
                task = self._task(event.sample)
                self._bars.update(task, completed=event.step, total=event.total)
            case events.SampleFinished():
                self._unfinished.discard(event.sample)
                self._bars.update(self._task(event.sample), note=f"seed {event.seed}")
                if not self._unfinished:
                    self.note("storing")
            case events.SampleStored():
                task = self._task(event.sample)
                note = self._bars.tasks[task].fields["note"]
                self._bars.update(task, note=f"{note}, stored".lstrip(", "))
            case events.Succeeded() | events.Failed() | events.Cancelled():
                symbol, colour, self._status = ENDS[type(event)]
                self._end = (symbol, colour)

    def _begin(self, event: events.Snapshot) -> None:
        self._unfinished = set(range(event.job.spec.samples))
        self.note("queued" if event.job.state is State.QUEUED else "running")

    def _reset_bars(self) -> None:
        self._unfinished |= set(self._tasks)
        for task in self._tasks.values():
            self._bars.update(task, completed=0, note="")

    def _task(self, sample: int) -> TaskID:
        if sample not in self._tasks:
            self._tasks[sample] = self._bars.add_task(f"sample {sample}", total=None, note="")
        return self._tasks[sample]


class _Trouble(logging.Handler):
    """Shows what the client logs: that the connection is lost, that it is there again."""

    def __init__(self, display: LiveDisplay) -> None:
        super().__init__(logging.INFO)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.note(record.getMessage())


def queued_text(event: events.Queued) -> str:
    """For example "queued again (worker lost), 2 jobs before it, about 5 s"."""
    parts = [f"queued again ({event.requeue_reason})" if event.requeue_reason else "queued"]
    if event.position >= 0:
        jobs = "1 job" if event.position == 1 else f"{event.position} jobs"
        parts.append("next" if event.position == 0 else f"{jobs} before it")
    if event.eta_seconds is not None:
        parts.append(f"about {event.eta_seconds:.0f} s")
    return ", ".join(parts)


def display() -> Display:
    """The live display when stderr is a terminal, otherwise none."""
    console = Console(stderr=True)
    return LiveDisplay(console) if console.is_terminal else NoDisplay()
