"""The command `img2img`.

Exit codes: 0 done, 1 the job failed or the service could not do it, 2 the request is wrong,
130 stopped by Ctrl-C. With --json one object goes to stdout, and nothing else does.
"""

from __future__ import annotations

import click

from img2img_client.cli.admin import admin
from img2img_client.cli.generate import generate
from img2img_client.cli.jobs import cancel, capabilities, get, list_jobs, redeliver, watch
from img2img_client.cli.program import Program


@click.group(
    cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="img2img-service")
def main() -> None:
    """Turn pictures into new pictures with the img2img service."""


for command in (generate, watch, get, list_jobs, cancel, redeliver, capabilities, admin):
    main.add_command(command)
