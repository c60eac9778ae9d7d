"""Explains to a caller why a request to an address that the caller supplied failed.

The texts name no IP address and no port, which the error's own text may hold.
"""

from __future__ import annotations

import os
import ssl

import aiohttp

from img2img_server.outbound.policy import ConnectionBrokenError, ForbiddenAddressError
from img2img_server.outbound.reading import OVERHEAD_BYTES, OverheadExceededError

_MOST_CHARACTERS = 300


def cause_of(error: Exception, host: str) -> str:
    """Returns the cause as a clause, for example "the name files.example cannot be resolved".

    Args:
        error: An error of a request by an OutboundPolicy's session.
        host: The requested host, as the caller may see it.
    """
    return _cause(error, host)[:_MOST_CHARACTERS]


def _cause(error: Exception, host: str) -> str:
    match error:
        case ForbiddenAddressError():
            return error.cause
        case aiohttp.ClientConnectorCertificateError():
            return f"the TLS certificate of {host} is not valid: {_certificate_fault(error)}"
        case aiohttp.ClientConnectorDNSError():
            return f"the name {host} cannot be resolved"
        case aiohttp.ClientSSLError():
            return f"the TLS connection to {host} failed: {_tls_fault(error.os_error)}"
        case aiohttp.ClientConnectorError():
            return f"no connection to {host}: {_system_fault(error.os_error)}"
        case OverheadExceededError():
            limit = f"{OVERHEAD_BYTES // 1024} KiB"
            return f"the server sent more than {limit} of headers and other data without content"
        case ConnectionBrokenError():
            return "the connection broke before the server answered"
        case aiohttp.ClientPayloadError():
            return "the connection broke before the response was complete"
        case aiohttp.ClientResponseError():
            return "the server did not answer with valid HTTP"
        case TimeoutError():
            return "the server did not answer in time"
        case OSError():
            return f"the connection to {host} broke: {_system_fault(error)}"
        case _:
            return f"the request to {host} failed ({type(error).__name__})"


def _certificate_fault(error: aiohttp.ClientConnectorCertificateError) -> str:
    inner = error.certificate_error
    if isinstance(inner, ssl.SSLCertVerificationError):
        # The host after the comma is left out: it may be that of a redirect.
        return inner.verify_message.partition(",")[0].rstrip(".") or "it cannot be verified"
    return "it cannot be verified"


def _tls_fault(error: OSError) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return _system_fault(error)


def _system_fault(error: OSError) -> str:
    """Returns the system's text for the error number. The text contains no address."""
    # If several addresses fail, asyncio raises one error without a number.
    return os.strerror(error.errno).lower() if error.errno else "all its addresses failed"
