"""Reads the small files that settings name: keys, certificates, tokens."""

from __future__ import annotations

import codecs
import errno
import stat
from pathlib import Path
from typing import Final

MAX_BYTES: Final = 16 * 2**20  # a bundle of all public authorities has about 250 kB


def read_bytes(path: Path) -> bytes:
    """Returns the content of a regular file, without the byte order mark of Windows tools.

    gRPC and other libraries refuse that mark.

    Other kinds of files are refused: a pipe may block, and a device such as /dev/zero never ends.

    Raises:
        OSError: The file cannot be read; `strerror` says why.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        limit = f"it has more than {MAX_BYTES // 2**20} MiB"
        raise OSError(errno.EFBIG, limit, str(path))
    return content.removeprefix(codecs.BOM_UTF8)


def read_text(path: Path) -> str:
    """Returns the text of a file in UTF-8; errors are those of `read_bytes`."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        fault = f"it is no text in UTF-8 ({error.reason} at byte {error.start})"
        raise OSError(errno.EILSEQ, fault, str(path)) from error
