"""Profiles of the command, and the completion of shells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from img2img_client.cli import main
from tests.cli_runs import in_a_folder_with_a_photo
from tests.fake_service import FakeService, Refusal, serving
from tests.readme import ROOT, blocks

# The name of the program decides the name of the variable.
START = "import sys; sys.argv[0] = 'img2img'; from img2img_command import main; main()"
pytestmark = pytest.mark.usefixtures(in_a_folder_with_a_photo.__name__)


def write(text: str, mode: int = 0o600) -> None:
    """Writes the settings file of the test."""
    path = Path("config.toml")
    path.write_text(text)
    path.chmod(mode)


def call(*words: str) -> Result:
    return CliRunner().invoke(main, [*words])


@pytest.mark.parametrize(
    ("default", "words", "environment", "key"),
    [
        ("", ("--profile", "here"), {}, "of-here"),
        ("here", (), {}, "of-here"),
        ("here", ("--profile", "keyless"), {"IMG2IMG_API_KEY": "of-env"}, "of-env"),
        ("keyless", (), {"IMG2IMG_PROFILE": "here"}, "of-here"),
        ("", ("--profile", "here"), {"IMG2IMG_API_KEY": "of-env"}, "of-here"),
        ("here", (), {"IMG2IMG_API_KEY": "of-env"}, "of-env"),
        ("", ("--profile", "here", "--api-key", "given"), {}, "given"),
        ("here", ("--api-key", "given"), {}, "given"),
        ("keyless", (), {}, "dev-key"),
    ],
)
def test_a_profile_gives_server_and_key(
    default: str,
    words: tuple[str, ...],
    environment: dict[str, str],
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = FakeService()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with serving(service) as port:
        first = f'default = "{default}"\n' if default else ""
        server = f'server = "127.0.0.1:{port}"\n'
        write(f'{first}[profiles.here]\n{server}api_key = "of-here"\n[profiles.keyless]\n{server}')
        result = call("get", "10000001", *words)
    assert result.exit_code == 0, result.output
    assert service.keys == [f"Bearer {key}"]


@pytest.mark.parametrize("is_variable", [False, True])
def test_a_server_that_is_named_otherwise_never_gets_the_key_of_a_profile(
    is_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write('default = "far"\n[profiles.far]\nserver = "far.example.com"\napi_key = "secret"\n')
    service = FakeService()
    with serving(service) as port:
        server = f"127.0.0.1:{port}"
        words = () if is_variable else ("--server", server)
        if is_variable:
            monkeypatch.setenv("IMG2IMG_SERVER", server)
        assert call("get", "10000001", *words).exit_code == 0
        assert service.keys == ["Bearer dev-key"]
        result = call("get", "10000001", "--profile", "far", "--server", server)
    assert result.exit_code == 2
    assert "--server cannot be combined with a profile" in result.stderr
    assert len(service.keys) == 1


def test_the_certificates_of_a_profile_are_in_the_folder_of_its_file() -> None:
    write('[profiles.a]\nserver = "10.0.0.7"\napi_key = "k"\nca_file = "none.pem"\n')
    result = call("capabilities", "--profile", "a")
    assert result.exit_code == 2
    assert f"cannot read {Path('none.pem').absolute()}" in result.stderr
    assert f"Invalid value for ca_file in {Path('config.toml').absolute()}, profile 'a'" in (
        result.stderr
    )


def test_without_a_file_an_unknown_profile_says_how_to_add_it() -> None:
    result = call("list", "--profile", "lab")
    assert result.exit_code == 2
    path = Path("config.toml").absolute()
    assert result.stderr.splitlines()[-1] == (
        f"Error: there is no profile 'lab': add [profiles.lab] to {path}, which does not exist "
        "yet, with server and api_key (--profile or IMG2IMG_PROFILE)"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('server = "a b"', "Invalid value for server in {place}: server must be host:port"),
        (
            'server = "x"',
            "x needs an API key: set it with --api-key or IMG2IMG_API_KEY, or api_key in {place}",
        ),
        ('server = "x"\napi_key = "ä"', "Invalid value for api_key in {place}: api_key cannot be"),
        ('server = "127.0.0.1"\ncert_file = "c.pem"', "only cert_file in {place} was given"),
        ('server = "127.0.0.1"\nca_file = "config.toml"', "Invalid value for ca_file in {place}"),
        ('server = "127.0.0.1"\ntls_name = "x"', "Invalid value for tls_name in {place}"),
    ],
)
def test_a_wrong_setting_of_a_profile_is_named_with_its_place(settings: str, words: str) -> None:
    write(f"[profiles.a]\n{settings}\n")
    place = f"{Path('config.toml').absolute()}, profile 'a'"
    result = call("list", "--profile", "a")
    assert result.exit_code == 2
    assert words.format(place=place) in result.stderr
    found = json.loads(call("list", "--profile", "a", "--json").stdout)["error"]
    assert "config.toml" not in found["violations"][0]["field"]


@pytest.mark.parametrize("is_variable", [False, True])
def test_an_address_that_is_not_found_is_named_with_its_source(
    is_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = "nowhere.invalid:1"
    words = ("list", "--api-key", "k")
    if is_variable:
        monkeypatch.setenv("IMG2IMG_SERVER", server)
        source = "IMG2IMG_SERVER"
    else:
        write(f'[profiles.a]\nserver = "{server}"\n')
        words = (*words, "--profile", "a")
        source = f"server in {Path('config.toml').absolute()}, profile 'a'"
    result = call(*words)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"Check the address: it comes from {source}."


def test_a_rejected_key_of_a_profile_is_named_with_its_place() -> None:
    refused = Refusal(grpc.StatusCode.UNAUTHENTICATED, "The API key is wrong", "INVALID_API_KEY")
    with serving(FakeService(refusals=deque([refused]))) as port:
        write(f'[profiles.a]\nserver = "127.0.0.1:{port}"\napi_key = "k"\n')
        result = call("get", "10000001", "--profile", "a")
    place = f"{Path('config.toml').absolute()}, profile 'a'"
    assert result.stderr.splitlines()[-1] == (
        f"The key comes from api_key in {place}. Set your key with --api-key or IMG2IMG_API_KEY."
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[profiles", "is not a TOML file"),
        ("colour = 1", "there is no setting colour; there are default and profiles"),
        ("profiles = 1", "profiles must be tables"),
        ("[profiles]\na = 1", "must be a table"),
        ('[profiles.a]\nsever = "x"', "there is no setting 'sever'"),
        ("[profiles.a]\nserver = 5", "server must be text"),
        ('[profiles.a]\nserver = "x"\ntls = "yes"', "tls must be true or false"),
        ("[profiles.a]\ntls = true", 'server is missing: add server = "HOST:PORT"'),
        ('default = "b"\n[profiles.a]\nserver = "x"', "default is 'b', and there is no such"),
        ('[profiles.b]\nserver = "x"', "or choose one of its profiles, b (--profile or IMG2IMG_"),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_setting(text: str, words: str) -> None:
    write(text)
    result = call("get", "10000001", "--profile", "a")
    assert result.exit_code == 2
    assert words in result.stderr
    assert "config.toml" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
@pytest.mark.parametrize(("mode", "code"), [(0o600, 0), (0o400, 0), (0o640, 2), (0o604, 2)])
def test_a_file_with_keys_that_other_users_can_read_is_refused(mode: int, code: int) -> None:
    write('[profiles.a]\nserver = "x"\napi_key = "secret"\n', mode)
    result = call("profiles")
    assert result.exit_code == code
    assert ("chmod 600" in result.stderr) == (code == 2)
    assert "secret" not in result.output
    write('[profiles.a]\nserver = "x"\n', mode)
    assert call("profiles").exit_code == 0


def test_profiles_are_listed_without_their_keys() -> None:
    assert call("profiles").stdout == f"no profiles in {Path('config.toml').absolute()}\n"
    write(
        'default = "b"\n[profiles.a]\nserver = "x"\n'
        '[profiles.b]\nserver = "y:1"\napi_key = "secret"\ntls = true\n'
    )
    assert call("profiles").stdout == "a  x  (without a key)\nb  y:1  (default, TLS)\n"
    found = json.loads(call("profiles", "--json").stdout)["profiles"]
    assert [each["name"] for each in found if each["is_default"]] == ["b"]
    assert found[1] == {
        "name": "b",
        "server": "y:1",
        "has_api_key": True,
        "tls": True,
        "is_default": True,
    }


def test_the_file_on_the_page_is_a_file_of_profiles() -> None:
    [block] = blocks(ROOT / "docs/client.md", "toml")
    write(block.text)
    names = [each["name"] for each in json.loads(call("profiles", "--json").stdout)["profiles"]]
    assert names == ["staging", "lab"]


def complete(*words: str) -> list[str]:
    """Returns what bash offers for the word at the end, as `type,value`."""
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "_IMG2IMG_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["img2img", *words]),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_shell_completes_commands_options_states_files_and_profiles() -> None:
    write('[profiles.staging]\nserver = "x"\n[profiles.lab]\nserver = "y"\n')
    assert complete("est") == ["plain,estimate"]
    assert complete("generate", "--init-i") == ["plain,--init-image"]
    assert complete("list", "--state", "que") == ["plain,queued"]
    assert complete("generate", "--init-image", "ph") == ["file,"]
    assert complete("list", "--profile", "st") == ["plain,staging"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_documented_line_of_a_shell_prints_a_script(shell: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "_IMG2IMG_COMPLETE": f"{shell}_source",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"_IMG2IMG_COMPLETE={shell}_complete" in done.stdout
