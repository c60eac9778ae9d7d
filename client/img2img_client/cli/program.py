"""How the command ends, whatever happens: one exit code, and with --json one object on stdout."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from img2img_client.cli.output import (
    FAILED,
    INTERRUPTED,
    WRONG,
    EndedError,
    error_facts,
    simple_facts,
    to_json,
    usage_facts,
)
from img2img_client.errors import Img2ImgError, InvalidRequestError, RpcError


class Program(click.Group):
    """The group of all commands. The only place that turns errors into exit codes."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs the command that `args` name and exits."""
        words = list(sys.argv[1:] if args is None else args)
        before_dashes = words[: words.index("--")] if "--" in words else words
        as_json = "--json" in before_dashes  # parsing may fail before it gets there
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except EndedError as ended:
            _end(as_json, ended.code, ended.facts)
        except click.Abort:
            _end(as_json, INTERRUPTED, {"error": simple_facts("INTERRUPTED", "stopped by Ctrl-C")})
        except click.ClickException as error:
            error.show()
            _end(as_json, error.exit_code, {"error": usage_facts(error)})
        except Img2ImgError as error:
            _show(error)
            code = WRONG if isinstance(error, InvalidRequestError) else FAILED
            _end(as_json, code, {"error": error_facts(error)})
        except OSError as error:
            if error.errno == errno.EPIPE:  # nobody reads stdout any more
                raise
            text = f"cannot write {error.filename or 'the output'}: {error.strerror or error}"
            click.echo(f"Error: {text}", err=True)
            _end(as_json, FAILED, {"error": simple_facts("FILE_NOT_WRITTEN", text)})
        except Exception as error:  # a mistake in this program: the traceback says where
            if as_json:
                click.echo(to_json({"error": simple_facts("INTERNAL", repr(error))}))
            raise
        sys.exit(code if isinstance(code, int) else 0)


def _show(error: Img2ImgError) -> None:
    """Says what is wrong, one line a violation, then what may help."""
    violations = error.violations if isinstance(error, RpcError) else ()
    for line in [violation.description for violation in violations] or [str(error)]:
        click.echo(f"Error: {line}", err=True)
    for note in getattr(error, "__notes__", ()):
        click.echo(note, err=True)


def _end(as_json: bool, code: int, facts: dict[str, object]) -> NoReturn:
    if as_json:
        try:
            click.echo(to_json(facts))
        except OSError as error:  # stdout is full or closed: stderr has said why the command ends
            click.echo(f"Error: cannot write to stdout: {error.strerror}", err=True)
            code = code or FAILED
    sys.exit(code)
