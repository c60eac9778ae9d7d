"""Declares calls with a single response, once for the blocking and the asyncio client."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rpc(Generic[R]):
    """One call: the method of a gRPC stub, its request, and how to read its response."""

    method: Callable[..., Any]
    request: object
    read: Callable[[Any], R]


class Blocking:
    """Base of classes whose calls block. `_call(method, request)` returns the response."""

    _call: Callable[..., Any]


class Asyncio:
    """Base of classes whose calls are coroutines. `_call(method, request)` awaits the response."""

    _call: Callable[..., Coroutine[Any, Any, Any]]


class Unary(Generic[P, R]):
    """Decorates a method that returns an Rpc. Calling the method makes the call: it returns the
    result in a Blocking class, and a coroutine in an Asyncio class."""

    def __init__(self, describe: Callable[Concatenate[Any, P], Rpc[R]]) -> None:
        self._describe = describe

    @overload
    def __get__(self, instance: None, owner: type) -> Callable[Concatenate[Any, P], Rpc[R]]: ...
    @overload
    def __get__(self, instance: Blocking, owner: type) -> Callable[P, R]: ...
    @overload
    def __get__(self, instance: Asyncio, owner: type) -> Callable[P, Coroutine[Any, Any, R]]: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self._describe  # copies the docstring and the name for help()
        describe = self._describe.__get__(instance)  # The bound method's signature has no self.

        @wraps(describe)
        def call(*args: P.args, **options: P.kwargs) -> R:
            rpc: Rpc[R] = describe(*args, **options)
            return rpc.read(instance._call(rpc.method, rpc.request))

        @wraps(describe)
        async def call_async(*args: P.args, **options: P.kwargs) -> R:
            rpc: Rpc[R] = describe(*args, **options)
            return rpc.read(await instance._call(rpc.method, rpc.request))

        return call_async if isinstance(instance, Asyncio) else call
