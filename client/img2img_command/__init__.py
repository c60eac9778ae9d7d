"""Starts the command `img2img`.

A package of its own, because gRPC reads GRPC_VERBOSITY when it is first imported, which importing
anything of img2img_client does. The library itself does not change environment variables.
"""

from __future__ import annotations

import os


def main() -> None:
    """Runs the command and keeps gRPC's own log lines out of its output."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from img2img_client.cli import main as run

    run()
