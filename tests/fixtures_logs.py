"""Undoes what a command that runs in the process of the tests does to the logs of this process."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

_configure = structlog.configure
_undo: list[Callable[[], None]] = []


def _configure_for_one_test(**options: Any) -> None:
    """Configures structlog without its cache, which would keep the configuration for ever."""
    _undo.append(_restoring())
    _configure(**options | {"cache_logger_on_first_use": False})


def _restoring() -> Callable[[], None]:
    """Returns a function that makes the logs as they are now."""
    root, logger_class, environment = logging.root, logging.getLoggerClass(), dict(os.environ)
    handlers, level = root.handlers[:], root.level
    hooks = sys.excepthook, sys.unraisablehook, threading.excepthook
    loggers = {
        logger: (logger.level, logger.handlers[:])
        for logger in root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
    }

    def restore() -> None:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
        logging.captureWarnings(False)
        logging.setLoggerClass(logger_class)
        root.handlers, root.level = handlers, level
        for logger in root.manager.loggerDict.values():
            if not isinstance(logger, logging.Logger):
                continue
            if logger.__class__.__module__ == "img2img_server.telemetry":
                logger.__class__ = logging.Logger
                vars(logger).setdefault("propagate", True)
            if logger in loggers:
                logger.level, logger.handlers = loggers[logger]
        root.manager._clear_cache()  # type: ignore[attr-defined]
        sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
        for name in ("GRPC_VERBOSITY", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            if name not in environment:
                os.environ.pop(name, None)

    return restore


structlog.configure = _configure_for_one_test


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    yield
    while _undo:
        _undo.pop()()
