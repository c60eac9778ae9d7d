"""Keeps torch's default number format at float32 while an engine computes.

transformers and diffusers change the default while they create a network in another format. It
belongs to the process, so without this module the steps of the other models of a catalogue would
compute with it, too. The changes are short, because the weights are read after them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

_NORMAL: Final = torch.float32

_log = logging.getLogger(__name__)


class DefaultDtype:
    """Lets threads compute together, but not while one of them has changed the default.

    Args:
        change: Changes the default of torch.
    """

    def __init__(self, change: Any) -> None:
        self._change = change
        self._ended = threading.Condition()
        self._computing = 0
        self._waiting = 0  # threads that will change the default
        self._changer: int | None = None  # the thread that has changed it
        self._own = threading.local()

    @property
    def _computes(self) -> bool:
        """Whether this thread is in the body of `normal`."""
        return bool(getattr(self._own, "computes", False))

    @contextmanager
    def normal(self) -> Iterator[None]:
        """Keeps the default at float32 in the body. It may be nested.

        A thread must request its turn on a device before this, never in the body.
        """
        if self._computes or self._changer == threading.get_ident():
            yield
            return
        with self._ended:
            # Threads that will change the default go first: steps follow each other without a gap.
            self._ended.wait_for(lambda: self._changer is None and not self._waiting)
            if torch.get_default_dtype() != _NORMAL:
                _log.warning("default_dtype_restored: it was %s", torch.get_default_dtype())
                self._change(_NORMAL)
            self._computing += 1
        self._own.computes = True
        try:
            yield
        finally:
            self._own.computes = False
            with self._ended:
                self._computing -= 1
                self._ended.notify_all()

    def set(self, dtype: Any) -> None:
        """Changes the default as torch.set_default_dtype does. Waits until no thread computes."""
        me = threading.get_ident()
        with self._ended:
            is_own = self._changer == me or self._computes
            if dtype != _NORMAL and not is_own:
                self._waiting += 1
                try:
                    self._ended.wait_for(lambda: self._changer is None and not self._computing)
                finally:
                    self._waiting -= 1
                    self._ended.notify_all()
                self._changer = me
            self._change(dtype)
            if torch.get_default_dtype() == _NORMAL and self._changer == me:
                self._changer = None
                self._ended.notify_all()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the default after the body, which may raise while the default is changed."""
        try:
            yield
        finally:
            if self._changer == threading.get_ident():
                self.set(_NORMAL)


DEFAULT_DTYPE: Final = DefaultDtype(torch.set_default_dtype)


def _set_default_dtype(d: Any, /) -> None:
    DEFAULT_DTYPE.set(d)


torch.set_default_dtype = _set_default_dtype  # The libraries call it by this name.
