"""The command `img2img`.

Exit codes: 0 success, 1 the job failed or the service is unavailable or rejects the call, 2 the
request is invalid, 130 interrupted by Ctrl-C. With --json, stdout contains one object and nothing
else.
"""

from __future__ import annotations

import click

from img2img_client import __version__
from img2img_client.cli.admin import admin
from img2img_client.cli.jobs import (
    cancel,
    capabilities,
    estimate,
    generate,
    get,
    list_jobs,
    redeliver,
    watch,
)
from img2img_client.cli.profiles import profiles
from img2img_client.cli.program import Program


@click.group(
    cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="img2img")
def main() -> None:
    """Generate images from images with the img2img service.

    \b
    Example:
      img2img generate --prompt "an oil painting of a cat" --init-image photo.jpg

    The exit code is 0 for success, 1 if the job failed or the service is unavailable, 2 if the
    request is invalid, and 130 after Ctrl-C.
    """


COMMANDS = (
    generate,
    estimate,
    watch,
    get,
    list_jobs,
    cancel,
    redeliver,
    capabilities,
    profiles,
    admin,
)
for command in COMMANDS:
    main.add_command(command)
