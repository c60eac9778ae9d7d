"""Configures logs, metrics and probes of a role."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    MutableMapping,
)
from contextlib import asynccontextmanager
from itertools import product
from typing import Any, Final, TextIO

import structlog
from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
)
from prometheus_client.registry import Collector

from img2img_server import __version__
from img2img_server.last_line import is_json
from img2img_server.library_logs import ActionableRecords, LibraryLimit, mask_secrets
from img2img_server.ports import host_port, listeners
from img2img_server.settings import Settings
from img2img_server.tasks import background_task
from img2img_server.tracing import trace_id

# seconds between the callbacks whose lag is measured
LAG_INTERVAL_SECONDS: Final = 0.1
# A stopping role waits this long for the responses of its probe server. aiohttp's default is a
# minute, which a connection that is opened during the stop would use up.
PROBES_STOP_SECONDS: Final = 1.0

log = structlog.get_logger()

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

BUILD_INFO = Gauge(
    "img2img_build_info", "Always 1; the labels are the version and the role.", ["version", "role"]
)
RPCS = Counter("img2img_rpcs_total", "Finished RPCs.", ["method", "code"])
RPC_SECONDS = Histogram("img2img_rpc_seconds", "Time of RPCs.", ["method"], buckets=_SECONDS)
WATCHERS = Gauge("img2img_watchers", "Open event streams.")
EVENT_BYTES = Gauge(
    "img2img_event_bytes",
    "Bytes of events in memory: `kept` for all streams, or `sending` to callers.",
    ["state"],
)
EVENT_REREADS = Counter(
    "img2img_event_rereads_total", "Reads of the event log for a stream that fell behind."
)
JOBS_CREATED = Counter("img2img_jobs_created_total", "Jobs accepted.", ["model", "lane"])
JOBS_ENDED = Counter("img2img_jobs_ended_total", "Jobs ended by this worker.", ["model", "state"])
QUEUED_GPU_SECONDS = Gauge(
    "img2img_queued_gpu_seconds",
    "Estimated device time of jobs that have not ended: `waiting` for a worker, or `taken` by one.",
    ["model", "lane", "state"],
)
UNFINISHED_JOBS = Gauge(
    "img2img_unfinished_jobs",
    "Jobs that wait or run, in the whole installation.",
    ["model", "lane"],
)
WORKERS = Gauge("img2img_workers", "Live workers, in the whole installation.", ["model"])
JOBS_RUNNING = Gauge("img2img_jobs_running", "Jobs that this worker has begun and not ended.")
CLOCK_SKEW = Gauge(
    "img2img_clock_skew_seconds",
    "This machine's clock minus that of NATS or the object store.",
    ["against"],
)
STORE_WAITING_BYTES = Gauge(
    "img2img_store_waiting_bytes", "Bytes of files that are being stored or wait for the bucket."
)
STAGE_SECONDS = Histogram(
    "img2img_stage_seconds",
    "Time of a job by stage; `wait` is `queue` and `held`.",
    ["stage", "model", "lane"],
    buckets=_SECONDS,
)
BATCH_FORWARDS = Histogram(
    "img2img_batch_forwards",
    "Forwards of a denoising step: a sample costs one, with guidance two.",
    ["model"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
MAX_BATCH_SIZE = Gauge(
    "img2img_max_batch_size", "Largest number of forwards of a denoising step.", ["model"]
)
DEVICE_BUSY_SECONDS = Counter(
    "img2img_device_busy_seconds_total", "Seconds in which the device worked.", ["model"]
)
DEVICE_MEMORY_BYTES = Gauge(
    "img2img_device_memory_bytes",
    "Memory of the worker's device: `used` by the worker, `free`, and `total`. On a CPU it is the "
    "memory of the machine.",
    ["device", "state"],
)
MODEL_LOADED = Gauge(
    "img2img_model_loaded", "1 while this worker has loaded the model, otherwise 0.", ["model"]
)
MODEL_WEIGHTS_BYTES = Gauge(
    "img2img_model_weights_bytes",
    "Bytes of the weights of a loaded model, otherwise 0.",
    ["model"],
)
MODEL_SWAPS = Counter(
    "img2img_model_swaps_total",
    "Models that were loaded after others were unloaded to make room for them.",
    ["model"],
)
MODEL_LOAD_FAILURES = Counter(
    "img2img_model_load_failures_total", "Models that could not be loaded.", ["model"]
)
STORE_CALLS = Counter(
    "img2img_store_calls_total",
    "Calls of the object store: `ok`, `failed` (another attempt may succeed) or `refused`.",
    ["outcome"],
)
OUTCOMES: Final = ("ok", "failed", "refused")
NATS_CALLS = Counter(
    "img2img_nats_calls_total", "Calls of JetStream: `ok` or `failed`.", ["outcome"]
)
NATS_RECONNECTS = Counter("img2img_nats_reconnects_total", "Lost connections to NATS, open again.")
STEPS = Counter("img2img_steps_total", "Denoising steps run.")
WEBHOOKS = Counter("img2img_webhooks_total", "Attempts at webhooks.", ["status"])
BUDGET_TOTAL = Gauge(
    "img2img_budget_total", "Size of a budget, see docs/operations.md.", ["budget"]
)
BUDGET_USED = Gauge("img2img_budget_used", "Part of a budget that requests hold.", ["budget"])
BUDGET_WAITING = Gauge(
    "img2img_budget_waiting", "Requests that wait for a part of a budget.", ["budget"]
)
BUDGET_REFUSED = Counter(
    "img2img_budget_refused_total",
    "Requests that got no part of a budget: it was `full`, no part became free in time (`wait`), "
    "or the request needs more than a tenant may hold (`size`).",
    ["budget", "why"],
)
LOOP_LAG = Histogram(
    "img2img_event_loop_lag_seconds",
    "How much later than scheduled a callback of the event loop ran.",
    buckets=_SECONDS,
)
TENANT_DEVICE_SECONDS = Counter(
    "img2img_tenant_device_seconds_total",
    "Device time of succeeded jobs, by tenant. A process names its first 100 tenants; `other` is "
    "the sum of the others.",
    ["tenant"],
)
REFUSED = Counter(
    "img2img_refused_total",
    "Calls that ended with an error, by tenant and reason. A process names its first 100 tenants; "
    "`other` is the sum of the others. The tenant is empty without a valid key.",
    ["tenant", "reason"],
)
_NAMED_TENANTS: Final = 100
_named_tenants: set[str] = set()
REDELIVERIES = Counter("img2img_redeliveries_total", "Jobs taken over after a worker was lost.")


# Metrics without labels have a value, 0, in every process. Other roles do not export it.
_ONLY_IN: Final[dict[str, frozenset[str]]] = {
    "img2img_watchers": frozenset({"api"}),
    "img2img_event_rereads": frozenset({"api"}),
    "img2img_jobs_running": frozenset({"worker"}),
    "img2img_store_waiting_bytes": frozenset({"worker"}),
    "img2img_steps": frozenset({"worker"}),
    "img2img_redeliveries": frozenset({"worker"}),
    "img2img_nats_reconnects": frozenset({"api", "worker"}),
}


class _RoleMetrics(Collector):
    """The metrics of one role."""

    def __init__(self, role: str) -> None:
        self._role = role

    def collect(self) -> Iterator[Metric]:
        for metric in REGISTRY.collect():
            if self._role in _ONLY_IN.get(metric.name, (self._role,)):
                yield metric


def count_from_zero(counter: Counter, *labels: Iterable[str]) -> None:
    """Exports a counter with 0 for each combination of values of its labels.

    The rate of a counter that appears with 1 is 0, so an alert would miss the first event.
    """
    for combination in product(*labels):
        counter.labels(*combination)


def count_usage(tenant: str, device_seconds: float) -> None:
    """Adds device time to the metric of a tenant."""
    TENANT_DEVICE_SECONDS.labels(_named(tenant)).inc(device_seconds)


def count_refusal(tenant: str, reason: str) -> None:
    """Counts a call that ended with an error.

    Args:
        tenant: Empty without a valid key.
    """
    REFUSED.labels(_named(tenant) if tenant else "", reason).inc()


def _named(tenant: str) -> str:
    """Returns the tenant as the value of a label, of which a process has a bounded number."""
    if len(_named_tenants) < _NAMED_TENANTS:
        _named_tenants.add(tenant)
    return tenant if tenant in _named_tenants else "other"


def configure_logging(settings: Settings, role: str) -> None:
    """Configures structured logs on stderr: JSON, or coloured lines on a terminal.

    In JSON every line is an object: Python's warnings, uncaught errors and the records of libraries
    are log records, progress bars of libraries are off, and the core of gRPC logs nothing unless
    GRPC_VERBOSITY is set. Only crashes in native code write plain text. Call it before the
    libraries are imported.
    """
    as_json = is_json(settings.log_format)
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level.upper()]
        ),
        cache_logger_on_first_use=True,
    )
    handler = log_handler(sys.stderr, as_json=as_json)
    logging.root.handlers = [handler]
    # Libraries log at warning and above: some log whole requests at info.
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("img2img_server").setLevel(settings.log_level.upper())
    _redirect_to_root()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if as_json:
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    structlog.contextvars.bind_contextvars(role=role)


def log_handler(stream: TextIO, *, as_json: bool) -> logging.Handler:
    """Returns the handler that writes the records of the service and of its libraries."""
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    handler = logging.StreamHandler(stream)
    handler.addFilter(ActionableRecords())
    handler.addFilter(LibraryLimit())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*_SHARED, mask_secrets],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    return handler


class _LibraryLogger(logging.Logger):
    """A logger of a library that writes only through the root logger.

    Some libraries add a handler for stderr to their loggers, with or without propagation to the
    root logger: a line would be written twice, or in a second format.
    """

    @property
    def propagate(self) -> bool:
        return True

    @propagate.setter
    def propagate(self, value: bool) -> None: ...

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802
        if not _writes_to_console(hdlr):
            super().addHandler(hdlr)


def _writes_to_console(handler: logging.Handler) -> bool:
    streams = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams


def _redirect_to_root() -> None:
    """Makes log records of warnings, uncaught errors and the lines of libraries."""
    logging.captureWarnings(True)
    logging.setLoggerClass(_LibraryLogger)
    for logger in logging.root.manager.loggerDict.values():
        if type(logger) is logging.Logger:  # The default handler exists already.
            logger.__class__ = _LibraryLogger
            logger.handlers = [each for each in logger.handlers if not _writes_to_console(each)]

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            name = args.thread.name if args.thread else ""
            log.error("thread_failed", thread=name, exc_info=args.exc_value)

    def unraisable(args: Any) -> None:
        log.error("error_ignored", where=repr(args.object), exc_info=args.exc_value)

    threading.excepthook = in_thread
    sys.unraisablehook = unraisable
    sys.excepthook = lambda _, error, __: log.error("uncaught_error", exc_info=error)


def _add_trace(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Adds the id of the current trace."""
    if found := trace_id():
        event["trace_id"] = found
    return event


_SHARED: Final[tuple[structlog.types.Processor, ...]] = (
    structlog.contextvars.merge_contextvars,
    _add_trace,
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
)


async def _observe_loop_lag() -> None:
    """Measures how late the event loop runs its callbacks. Runs until it is cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_INTERVAL_SECONDS
        await asyncio.sleep(LAG_INTERVAL_SECONDS)
        LOOP_LAG.observe(max(0.0, loop.time() - due))


@asynccontextmanager
async def probe_server(
    settings: Settings, role: str, why_not_ready: Callable[[], str | Awaitable[str]]
) -> AsyncIterator[str]:
    """Serves /metrics, /livez (the event loop runs) and /readyz (the role may get traffic), and
    measures the lag of the event loop.

    Args:
        role: api, gateway or worker, whose metrics are exported.
        why_not_ready: returns why the role is not ready; empty while it is.

    Yields:
        The address it listens on, "host:port".

    Raises:
        SettingsError: the port cannot be used.
    """
    BUILD_INFO.labels(__version__, role).set(1)
    registry = CollectorRegistry()
    registry.register(_RoleMetrics(role))

    async def metrics(_: web.Request) -> web.Response:
        body = generate_latest(registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def readyz(_: web.Request) -> web.Response:
        why = why_not_ready()
        if not isinstance(why, str):
            why = await why
        return web.Response(status=503 if why else 200, text=f"{why or 'ready'}\n")

    app = web.Application()
    app.add_routes(
        [web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz)]
    )
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, shutdown_timeout=PROBES_STOP_SECONDS
    )
    await runner.setup()
    try:
        (*_, listener) = listeners("worker", settings)
        site = web.TCPSite(runner, settings.metrics_host.strip("[]"), settings.metrics_port)
        try:
            await site.start()
        except OSError as error:
            raise listener.mistake(error) from error
        host, port = runner.addresses[0][:2]
        async with background_task(_observe_loop_lag()):
            yield host_port(host, port)
    finally:
        await runner.cleanup()
