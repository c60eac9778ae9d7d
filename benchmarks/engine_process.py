"""Runs each compared system in its own process, so that they share no threads or memory."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.engine_architectures import ARCHITECTURES, build
from benchmarks.engine_clock import Clock
from benchmarks.engine_load import Request, Served
from benchmarks.engine_servers import EngineServer, job_of
from benchmarks.engine_stock import StockServer, call, load_pipeline
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.engine.options import limit_spinning
from img2img_server.malloc import keep_freed_memory

STOP_SECONDS = 10.0


class Server(Protocol):
    """A system that is compared."""

    def serve(self, load: Sequence[Request]) -> Served:
        """Runs a load in real time."""
        ...

    def stop(self) -> None:
        """Stops the system."""
        ...


@dataclass(frozen=True)
class Place:
    """The values that all systems share: the model, the device, the threads of torch, the rows of a
    batch.

    `source`: a diffusers directory, or the name of an architecture with random weights.
    `oracle`: the name of the small model of the oracle in that directory, if it is one.
    """

    source: str
    device: str
    dtype: str
    threads: int
    rows: int
    oracle: str = ""

    def settle(self) -> None:
        """Configures this process like that of a worker."""
        torch.set_num_threads(self.threads)
        if self.device == "cpu":
            keep_freed_memory()

    def pipeline(self) -> Any:
        """Returns the pipeline, from files or with random weights."""
        device, dtype = torch.device(self.device), getattr(torch, self.dtype)
        if self.source in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                return build(self.source, Path(folder), device, dtype)
        return load_pipeline(self.source, device, dtype)


@dataclass(frozen=True)
class StockOf:
    """Creates the server of the stock pipeline; `most`: requests in one call."""

    place: Place
    most: int

    def __call__(self) -> Server:
        pipeline, arguments = self.place.pipeline(), call
        if self.place.oracle:
            from tests.oracle.harness import models

            one = models()[self.place.oracle].call
            arguments = lambda group: one(job_of(group[0]))  # noqa: E731
            self.place.settle()  # Importing the oracle has changed the number of threads.
        return StockServer(pipeline, Clock(pipeline), self.most, arguments)


@dataclass(frozen=True)
class EngineOf:
    """Creates the server of this engine."""

    place: Place

    def __call__(self) -> Server:
        from img2img_server.engine.load import on_own_thread  # This import loads torch.

        def load() -> EngineServer:
            pipeline = self.place.pipeline()
            is_folder = self.place.source not in ARCHITECTURES
            spec = read_model_spec(self.place.source) if is_folder else None
            return EngineServer(pipeline, Clock(pipeline), self.place.rows, spec=spec)

        return on_own_thread(load)


class RemoteServer:
    """A system in its own process, which begins to load at once."""

    def __init__(self, make: StockOf | EngineOf) -> None:
        limit_spinning()  # The process inherits this setting.
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make), daemon=True)
        self._process.start()
        other.close()

    def serve(self, load: Sequence[Request]) -> Served:
        """Runs a load in real time."""
        self._end.send(list(load))
        answer = self._end.recv()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Served)
        return answer

    def stop(self) -> None:
        """Ends the process."""
        self._end.close()
        self._process.join(STOP_SECONDS)
        self._process.kill()


def _serve(end: Connection, make: StockOf | EngineOf) -> None:
    """Serves one load after the other in the process, until the connection is closed."""
    make.place.settle()
    server = make()
    try:
        while True:
            try:
                load = end.recv()
            except EOFError:
                return
            try:
                end.send(server.serve(load))
            except Exception as error:  # The process that compares the systems receives this error.
                end.send(error)
    finally:
        server.stop()
