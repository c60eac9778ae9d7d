"""Named services with their keys, in a TOML file, for `--profile` and `img2img profiles`."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from img2img_client.cli.program import to_json

PROFILE_VARIABLE = "IMG2IMG_PROFILE"
CONFIG_VARIABLE = "IMG2IMG_CONFIG"


@dataclass(frozen=True, slots=True)
class Profile:
    """A service: the values of the options with the same names. Empty: not in the file."""

    server: str = ""
    api_key: str = field(default="", repr=False)
    tls: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    tls_name: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """The profiles of a file. `default`: the name of the one that is used without --profile."""

    path: Path
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    default: str = ""

    def get(self, name: str) -> Profile:
        """Returns the profile with this name. Raises click.UsageError."""
        if name in self.profiles:
            return self.profiles[name]
        text = f"there is no profile {name!r}: add [profiles.{name}] to {self.path}"
        if self.profiles:
            text += f", or choose one of its profiles, {', '.join(self.profiles)}"
        elif not self.path.exists():
            text += ", which does not exist yet, with server and api_key"
        raise click.UsageError(f"{text} (--profile or {PROFILE_VARIABLE})")

    def place(self, name: str) -> str:
        """Returns where a profile is, for messages."""
        return f"{self.path}, profile {name!r}"


def config_path() -> Path:
    """Returns the path of the file: IMG2IMG_CONFIG, else img2img/config.toml in the folder of
    settings of the user."""
    given = os.environ.get(CONFIG_VARIABLE)
    return Path(given) if given else Path(click.get_app_dir("img2img")) / "config.toml"


def read_config() -> Config:
    """Returns the profiles of the file; none if there is no file.

    Raises:
        click.UsageError: the file is wrong, cannot be read, or others can read the keys in it.
    """
    path = config_path()
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = tomllib.load(file)
    except FileNotFoundError:
        return Config(path)
    except OSError as error:
        raise click.UsageError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        text = f"{path} is not a TOML file: byte {error.start} is not UTF-8"
        raise click.UsageError(text) from error
    except tomllib.TOMLDecodeError as error:
        raise click.UsageError(f"{path} is not a TOML file: {error}") from error
    config = _read(path, content)
    has_keys = any(profile.api_key for profile in config.profiles.values())
    if has_keys and os.name == "posix" and mode & 0o077:
        text = f"{path} has API keys and other users can use it (mode {mode:04o}): chmod 600 {path}"
        raise click.UsageError(text)
    return config


def _read(path: Path, content: dict[str, Any]) -> Config:
    tables, default = content.pop("profiles", {}), content.pop("default", "")
    if content:
        text = f"there is no setting {', '.join(sorted(content))}; there are default and profiles"
        raise click.UsageError(f"{path}: {text}")
    if not isinstance(tables, dict) or not isinstance(default, str):
        text = "profiles must be tables, such as [profiles.lab], and default the name of one"
        raise click.UsageError(f"{path}: {text}")
    profiles = {name: _profile(path, name, table) for name, table in tables.items()}
    config = Config(path, profiles, default)
    if default and default not in profiles:
        known = ", ".join(profiles) or "none"
        text = f"default is {default!r}, and there is no such profile; the profiles are {known}"
        raise click.UsageError(f"{path}: {text}")
    return config


def _profile(path: Path, name: str, table: object) -> Profile:
    place = f"{path}, profile {name!r}"
    if not isinstance(table, dict):
        raise click.UsageError(f"{place}: must be a table, [profiles.{name}]")
    kinds = {each.name: type(each.default) for each in fields(Profile)}
    for key, value in table.items():
        if key not in kinds:
            known = ", ".join(kinds)
            raise click.UsageError(f"{place}: there is no setting {key!r}; there are {known}")
        if not isinstance(value, kinds[key]):
            kind = "true or false" if kinds[key] is bool else "text"
            raise click.UsageError(f"{place}: {key} must be {kind}")
    profile = Profile(**table)
    if not profile.server:
        raise click.UsageError(f'{place}: server is missing: add server = "HOST:PORT"')
    return profile


def complete_profile(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Returns the names of the profiles, for the completion of a shell."""
    try:
        config = read_config()
    except click.UsageError:
        return []
    found = config.profiles.items()
    return [CompletionItem(name, help=p.server) for name, p in found if name.startswith(incomplete)]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def profiles(as_json: bool) -> None:
    """List the profiles of the settings file, without their keys."""
    config = read_config()
    if as_json:
        found = [
            {
                "name": name,
                "server": profile.server,
                "has_api_key": bool(profile.api_key),
                "tls": profile.tls or bool(profile.ca_file),
                "is_default": name == config.default,
            }
            for name, profile in config.profiles.items()
        ]
        click.echo(to_json({"path": config.path, "profiles": found}))
        return
    if not config.profiles:
        click.echo(f"no profiles in {config.path}")
    for name, profile in config.profiles.items():
        notes = ["default"] if name == config.default else []
        notes += ["TLS"] if profile.tls or profile.ca_file else []
        notes += [] if profile.api_key else ["without a key"]
        click.echo("  ".join([name, profile.server, *([f"({', '.join(notes)})"] if notes else [])]))
