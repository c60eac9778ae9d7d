"""Measures the real architectures on a device, with random weights and without downloads.

Weights do not matter for speed. The most important parts come first: for every architecture time
and rate of a step by batch size and the end-to-end time of one request of 1 to 4 steps; then
the systems of benchmarks.engine under the mixed load; then requests and steps compiled. Every part
has a process and a time limit of its own, and the budget ends all of them: a part that fails or has
no time does not affect the others, and the report names it. The report is written again after every
number.

    python -m benchmarks.engine_device --output FILE.json [--budget 540]
        [--architectures flux-schnell] [--parts eager "compiled steps"] [--tiny]

Z-Image is compiled by block and the others as a whole, as the engine does. `--tiny`: architectures
with the same parts, but small, to try all of it on a CPU.

On a machine that has only torch, benchmarks/device.sh provides the other packages.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.ending import end_on_sigterm
from benchmarks.engine_report import READING, facts, load_table, table, write
from img2img_server.engine.options import limit_spinning

Rows = dict[str, Any]
Work = Callable[[], Iterable[tuple[str, Rows]]]

UNETS = ("sd-turbo", "sdxl-turbo", "sd15")
TRANSFORMERS = ("z-image-turbo", "flux-schnell", "sd35-medium")
TOYS = ("toy", *(f"toy-{name}" for name in TRANSFORMERS))
ARCHITECTURES = (*UNETS, *TRANSFORMERS, *TOYS)
HARDWARE = "hardware"
LOAD = "mixed load, "
# The parts in order, with the time limit of each in seconds.
LIMITS = {"eager": 90.0, "mixed load": 180.0, "compiled request": 120.0, "compiled steps": 150.0}
_STOP_SECONDS = 15.0


class PartError(Exception):
    """A part did not finish; the text says why."""


class Report:
    """Results, failures and parts that are not finished; it is valid even after SIGKILL.

    Args:
        output: path of the JSON; the Markdown is next to it. None: in memory only.
    """

    def __init__(self, parts: Iterable[str], output: Path | None) -> None:
        self.found: dict[str, Any] = {
            HARDWARE: {},
            "command": " ".join(sys.argv[1:]),
            "results": {},
            "left_out": list(parts),
            "failed": {},
        }
        self._output = output

    def run(self, architecture: str, part: str, work: Work, seconds: float) -> None:
        """Records the results of a part when they arrive, and its failure."""
        name, began = f"{architecture}: {part}", time.monotonic()
        self.found["left_out"].remove(name)
        try:
            for title, rows in bounded(work, seconds):
                if title == HARDWARE:
                    self.found[HARDWARE].update(rows)
                else:
                    tables = self.found["results"].setdefault(architecture, {})
                    tables.setdefault(title, {}).update(rows)
                write(self.found, self._output, markdown)
        except PartError as error:
            self.found["failed"][name] = str(error)
        write(self.found, self._output, markdown)
        print(f"{name} took {time.monotonic() - began:.1f} s", flush=True)


def bounded(work: Work, seconds: float) -> Iterator[tuple[str, Rows]]:
    """Yields the results of `work` in its own process, which is ended after this number of seconds.

    Raises:
        PartError: the work raised, its process died, or the time was not enough.
    """
    context = multiprocessing.get_context("spawn")
    end, other = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(other, work))
    until = time.monotonic() + seconds
    process.start()
    other.close()
    try:
        while end.poll(max(0.0, until - time.monotonic())):
            try:
                message = end.recv()
            except EOFError:
                process.join()
                if process.exitcode:
                    raise PartError(f"its process ended with {process.exitcode}") from None
                return
            if isinstance(message, str):
                raise PartError(message)
            yield message
        raise PartError(f"not done after {seconds:.0f} s")
    finally:
        process.terminate()
        process.join(_STOP_SECONDS)
        process.kill()
        process.join()


def _work(end: Connection, work: Work) -> None:
    end_on_sigterm()
    try:
        for found in work():
            end.send(found)
    except Exception:  # The other parts continue after any error.
        end.send(traceback.format_exc()[-2000:])


def _part(
    part: str, architecture: str, arguments: argparse.Namespace
) -> Iterator[tuple[str, Rows]]:
    # This check takes seconds of the budget.
    from benchmarks.engine_device_parts import PARTS

    return PARTS[part](architecture, arguments)


def markdown(report: dict[str, Any]) -> str:
    """Returns the report as Markdown tables."""
    lines = [
        facts(report[HARDWARE]),
        "",
        f"`python -m benchmarks.engine_device {report['command']}`",
        "",
        "Random weights. `share`: of the rate of a large matrix product on the same device.",
        "",
        READING,
    ]
    for architecture, tables in report["results"].items():
        lines += ["", f"## {architecture}"]
        for title, rows in tables.items():
            is_load = title.startswith(LOAD)
            lines += load_table(title, rows) if is_load else table(title, rows)
    if report["failed"] or report["left_out"]:
        lines += ["", "## Not measured", ""]
        lines += [f"- {name}: {why.splitlines()[-1]}" for name, why in report["failed"].items()]
        lines += [f"- {name}: no time was left" for name in report["left_out"]]
    return "\n".join(lines) + "\n"


def plan(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Yields architecture and part in the order in which they run."""
    parts = [
        part
        for part in LIMITS
        if part in arguments.parts and (arguments.compile or not part.startswith("compiled"))
    ]
    return [
        (architecture, part)
        for part in parts
        for architecture in (arguments.loaded if part == "mixed load" else arguments.architectures)
    ]


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments, with defaults that depend on others."""
    parser = argparse.ArgumentParser(description=__doc__)
    names: dict[str, Any] = {"choices": ARCHITECTURES}
    parser.add_argument("--architectures", nargs="+", **names)
    parser.add_argument("--loaded", nargs="*", **names)
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--tiny", action="store_true", help="toys instead of real architectures")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--compiled-batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=24, help="most requests of a load")
    parser.add_argument(
        "--load-seconds", type=float, default=10.0, help="most rows in a call of the stock pipeline"
    )
    parser.add_argument("--loads", type=float, nargs="*", default=[0.9])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--litserve", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(words)
    if arguments.architectures is None:
        arguments.architectures = TOYS if arguments.tiny else UNETS
    if arguments.loaded is None:
        arguments.loaded = arguments.architectures[:1]
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Runs within the budget; prints and writes JSON and Markdown."""
    began = time.monotonic()
    arguments = parsed(words)
    end_on_sigterm()
    limit_spinning()  # Processes of the parts inherit this variable.
    parts = plan(arguments)
    report = Report([f"{architecture}: {part}" for architecture, part in parts], arguments.output)
    for architecture, part in parts:
        left = arguments.budget - (time.monotonic() - began)
        if left > 0:
            work = functools.partial(_part, part, architecture, arguments)
            report.run(architecture, part, work, min(left, LIMITS[part]))
    print(markdown(report.found))


if __name__ == "__main__":
    main()
