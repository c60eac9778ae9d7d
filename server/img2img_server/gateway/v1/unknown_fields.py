"""Refuses parameters and fields that a call does not have: a misspelt one would have no effect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any

from starlette.requests import Request

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.domain.violations import Violation
from img2img_server.gateway.http.http_request import find_key, read_json
from img2img_server.gateway.v1 import protojson


async def refuse(
    request: Request,
    check_key: Callable[[], Awaitable[object]],
    sent: Mapping[str, Any] | None = None,
    *,
    known: Collection[str] = (),
) -> None:
    """Refuses unknown parameters in the query and, but for `key`, unknown fields in the body.

    Args:
        check_key: Raises RequestError for a wrong key, which is reported before wrong fields.
        sent: The body. None: the call has none.
        known: Names of the parameters of the call.

    Raises:
        RequestError: FIELDS, and that of the key.
    """
    wrong = [protojson.unknown(name) for name in sent or () if name != "key"]
    wrong += [each for each in in_query(request, known) if each not in wrong]
    if wrong:
        await check_key()
        raise RequestError(ErrorKind.FIELDS, violations=wrong)


async def key_of_body(request: Request, check_key: Callable[[str], Awaitable[object]]) -> str:
    """Returns the key of a request whose body has no other field.

    Args:
        check_key: Raises RequestError for a wrong key.

    Raises:
        RequestError: INVALID_JSON, FIELDS, and that of the key.
    """
    sent = await read_json(request, unique=True)
    key = find_key(request, sent)
    await refuse(request, partial(check_key, key), sent)
    return key


def in_query(request: Request, known: Collection[str] = ()) -> list[Violation]:
    """Returns a violation for each parameter of the query that is not known."""
    names = dict.fromkeys(request.query_params)
    return [protojson.unknown_parameter(name) for name in names if name not in known]
