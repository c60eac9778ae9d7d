"""Starts the command `img2img`.

A package of its own, because gRPC reads GRPC_VERBOSITY when it is first imported, which importing
anything of img2img_client does. The library leaves the environment of its process alone.
"""

from __future__ import annotations

import os


def main() -> None:
    """Runs the command, without gRPC's own log lines between what it prints."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from img2img_client.cli import main as run

    run()
