"""The playground: its headers, its files, and the paths that it calls."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import iter_route_contexts
from starlette.routing import Match

from img2img_client.cli import main as cli
from img2img_server import __version__
from img2img_server.api.keys import new_key
from img2img_server.compat.modelslab.examples import IMG2IMG
from img2img_server.gateway.api_channel import connect
from img2img_server.gateway.app import create_app
from img2img_server.local import _announce
from img2img_server.settings import Settings
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.http_stack import BASE

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "server/img2img_server/gateway/playground/static"
ASSETS = sorted(file.name for file in (PAGE / "assets").iterdir())
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with page_of(Settings()) as client:
        yield client


def page_of(config: Settings) -> httpx.AsyncClient:
    """Returns a client of a gateway without an api, which the page does not need."""
    app = create_app(config, connect(config), MemoryBlobStore())
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=BASE)


async def test_browsers_get_a_page_and_others_an_index(
    http: httpx.AsyncClient,
) -> None:
    page = await http.get("/", headers=BROWSER)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        answer = await http.get("/", headers=headers)
        assert (answer.status_code, answer.headers["vary"]) == (200, "Accept")
        index = answer.json()
        assert (index.pop("name"), index.pop("version")) == ("img2img", __version__)
        assert set(index) == {
            "docs",
            "openapi",
            "jobs",
            "capabilities",
            "openai",
            "health",
            "readiness",
        }
        for path in (index["docs"], index["openapi"], index["health"]):
            assert (await http.get(path)).status_code == 200
        config = Settings()
        app = create_app(config, connect(config), MemoryBlobStore())
        routes = {route.path for route in iter_route_contexts(app.routes)}
        assert set(index.values()) <= routes | {"/openapi.json"}
    assert page.headers["vary"] == "Accept"
    assert (await http.post("/", headers=BROWSER)).status_code == 404


async def test_the_policy_allows_nothing_inline_and_no_other_host(http: httpx.AsyncClient) -> None:
    page = await http.get("/", headers=BROWSER)
    policy = dict(
        rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";")
    )
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    assert page.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", page.text)


@pytest.mark.parametrize("name", ASSETS)
async def test_every_file_of_the_page_is_served_as_what_it_is(
    name: str, http: httpx.AsyncClient
) -> None:
    answer = await http.get(f"/playground/{name}")
    types = {".css": "text/css", ".js": "text/javascript", ".jpg": "image/jpeg"}
    assert answer.headers["content-type"].startswith(types.get(Path(name).suffix, "image/svg+xml"))
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await http.get(f"/playground/{name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_the_page_refers_to_its_own_files_only(http: httpx.AsyncClient) -> None:
    text = (await http.get("/", headers=BROWSER)).text
    for name in re.findall(r'(?:src|href)="playground/([^"]+)"', text):
        assert name in ASSETS
    for file in (PAGE / "index.html", *PAGE.glob("assets/*.js"), *PAGE.glob("assets/*.css")):
        assert not re.search(r"(https?:)?//[a-z0-9-]+\.", file.read_text())


async def test_every_path_that_the_page_calls_is_a_route() -> None:
    table = re.search(
        r"const PATHS = {(.*?)};", (PAGE / "assets/service.js").read_text(), re.DOTALL
    )
    assert table
    called = dict(re.findall(r'(\w+): "(.*?)"', table[1]))
    assert set(called) == {"settings", "example", "capabilities", "jobs", "cancel", "events"}
    config = Settings()
    app = create_app(config, connect(config), MemoryBlobStore())
    for name, path in called.items():
        method = "POST" if name in ("jobs", "cancel") else "GET"
        scope = {
            "type": "http",
            "headers": [],
            "method": method,
            "path": f"/{path}".replace("{job_id}", "10000001"),
        }
        assert any(route.matches(scope)[0] is Match.FULL for route in app.routes), path


async def test_no_page_of_another_site_can_show_the_docs_in_a_frame() -> None:
    async with page_of(Settings()) as http:
        policy = (await http.get("/docs")).headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy


async def test_the_examples_of_the_docs_work_with_the_development_key() -> None:
    path, jobs = "/api/v1/enterprise/realtime/img2img", "/v1/jobs"
    config = Settings(dev_key=True, http_port=8123, outbound_allow="127.0.0.0/8")
    url = "http://127.0.0.1:8123/playground/cat.jpg"
    assert example_of(config, path) | {"prompt": ""} == IMG2IMG | {
        "key": "dev-key",
        "init_image": url,
        "prompt": "",
    }
    assert example_of(config, jobs)["spec"]["init_image"] == {"url": url}
    assert example_of(config, "/api/v1/enterprise/update_s3")["key"] == "my-key"
    closed = Settings(dev_key=True, http_port=8123, outbound_allow="none")
    for other in (
        Settings(),
        Settings(dev_key=True),
        closed,
    ):  # The api cannot download the example image.
        assert example_of(other, jobs)["spec"]["init_image"]["url"].startswith("https://files.")
    assert example_of(Settings(), path)["key"] == "my-key"
    async with page_of(config) as http:
        headers = {"Host": "127.0.0.1"}
        assert 'const KEY = "dev-key";' in (await http.get("/docs/start.js", headers=headers)).text
    async with page_of(Settings()) as http:
        assert 'const KEY = "";' in (await http.get("/docs/start.js")).text


def example_of(config: Settings, path: str) -> Any:
    app = create_app(config, connect(config), MemoryBlobStore())
    body = app.openapi()["paths"][path]["post"]["requestBody"]
    return body["content"]["application/json"]["example"]


async def test_the_example_is_the_one_of_the_repository() -> None:
    assert (PAGE / "assets/cat.jpg").read_bytes() == (ROOT / "examples/cat.jpg").read_bytes()


async def test_the_page_gets_the_development_key_and_no_other_key(tmp_path: Path) -> None:
    key, entry = new_key("shop", [])
    file = tmp_path / "keys.toml"
    file.write_text(entry)
    nothing = plain = {"api_key": "", "grpc_address": "", "grpc_tls": False}
    for config, expected in (
        (Settings(), nothing),
        (Settings(api_keys_file=file, dev_key=True), nothing),
        (Settings(dev_key=True), plain | {"api_key": "dev-key", "grpc_address": "127.0.0.1:50051"}),
        (
            Settings(public_grpc_address="grpc.example.com:443", public_grpc_tls=True),
            {"api_key": "", "grpc_address": "grpc.example.com:443", "grpc_tls": True},
        ),
    ):
        async with page_of(config) as http:
            headers = {"Host": "127.0.0.1"}
            answer = await http.get("/playground/settings.json", headers=headers)
            assert (answer.json(), answer.headers["cache-control"]) == (expected, "no-store")
            page = await http.get("/", headers=BROWSER | headers)
            texts = [page.text] + [
                (await http.get(f"/playground/{name}", headers=headers)).text for name in ASSETS
            ]
            assert not any("dev-key" in text or key in text for text in texts)


async def test_no_other_page_gets_the_development_key() -> None:
    async with page_of(Settings(dev_key=True)) as http:
        answer = await http.get("/playground/settings.json", headers={"Host": "evil.example"})
        assert answer.status_code == 403


async def test_a_setting_turns_it_off() -> None:
    async with page_of(Settings(playground=False)) as http:
        assert (await http.get("/", headers=BROWSER)).json()["name"] == "img2img"
        for path in ("/playground", "/playground/settings.json", "/playground/main.js"):
            assert (await http.get(path, headers=BROWSER)).status_code == 404


def runnable(line: str) -> list[str]:
    """Returns the words of the command in the line, whose init image exists."""
    words = shlex.split(line.removeprefix("command: "))
    assert Path(words[words.index("--init-image") + 1]).is_file()
    return words


@pytest.mark.parametrize("playground", [True, False])
@pytest.mark.parametrize("dev_key", [True, False])
async def test_local_says_where_it_is_and_the_command_for_it(
    playground: bool, dev_key: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _announce(Settings(dev_key=dev_key, grpc_port=4321, http_port=8123, playground=playground))
    first, command, *more = capsys.readouterr().out.splitlines()
    assert first.startswith("img2img is ready: gRPC 127.0.0.1:4321, HTTP http://127.0.0.1:8123")
    key = "" if dev_key else " --api-key KEY"
    assert f"img2img generate --server 127.0.0.1:4321{key} --prompt " in command
    assert more == (["playground: http://127.0.0.1:8123/"] if playground else [])
    program, name, *words = runnable(command)
    assert shutil.which(program)
    # click caches the help option of a command with the command's first context, so a parent is
    # needed.
    with cli.make_context("img2img", [name, *words]) as parent:
        assert cli.commands[name].make_context(name, words, parent=parent)


async def test_the_command_of_local_works_outside_of_a_clone_and_with_the_client_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(sys.executable).parent
    monkeypatch.chdir(tmp_path)
    for path, expected in ((f"{folder}:/usr/bin", "img2img"), ("/usr/bin", f"{folder}/img2img")):
        monkeypatch.setenv("PATH", path)
        _announce(Settings(dev_key=True))
        assert runnable(capsys.readouterr().out.splitlines()[1])[0] == expected


async def test_the_command_for_a_service_with_tls_trusts_its_authority(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = tmp_path / "our ca.pem"
    file = tmp_path / "any.pem"
    _announce(Settings(tls_cert_file=file, tls_key_file=file, api_ca_file=authority))
    words = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert words[words.index("--ca-file") + 1] == str(authority)
    both = {"tls_client_ca_file": file, "api_cert_file": file, "api_key_file": file}
    _announce(Settings(tls_cert_file=file, tls_key_file=file, api_ca_file=authority, **both))
    words = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert (
        words[words.index("--cert-file") + 1] == words[words.index("--key-file") + 1] == str(file)
    )
