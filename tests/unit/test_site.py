"""The documentation site: its generated references are complete, and its links lead into it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from img2img.v1 import admin_service_pb2, event_pb2, job_pb2, service_pb2
from tests.readme import ROOT

FOLDER = ROOT / "docs/site"
PROTOCOL = (service_pb2, admin_service_pb2, job_pb2, event_pb2)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Imports modules of docs/site, which import each other as mkdocs does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield sys.modules[__name__]
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.usefixtures("site")
def test_the_grpc_reference_has_every_method_field_and_value_with_its_comment() -> None:
    import grpc_reference

    page = grpc_reference.render()
    names = set()
    for module in PROTOCOL:
        file = module.DESCRIPTOR
        for service in file.services_by_name.values():
            names |= {f"### {method.name}\n" for method in service.methods}
        for message in file.message_types_by_name.values():
            names |= {f'<a id="{message.name}.{field.name}"'.lower() for field in message.fields}
        for enum in file.enum_types_by_name.values():
            names |= {f'<a id="{value.name}"'.lower() for value in enum.values}
    assert sorted(name for name in names if name not in page) == []
    assert re.findall(r"^:   *$", page, re.MULTILINE) == [], "entries without a comment"


@pytest.mark.usefixtures("site")
def test_every_link_inside_the_grpc_reference_has_its_anchor() -> None:
    import grpc_reference

    page = grpc_reference.render()
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    anchors = {heading.lower().replace(".", "") for heading in headings}
    anchors |= set(re.findall(r'<a id="([^"]+)">', page))
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) - anchors == set()


@pytest.mark.usefixtures("site")
def test_the_http_reference_has_every_operation_and_type() -> None:
    import http_reference

    page, text = http_reference.render()
    document = json.loads(text)
    for path, methods in document["paths"].items():
        assert [f"`{name.upper()} {path}`" in page for name in methods] == [True] * len(methods)
    for name, schema in document["components"]["schemas"].items():
        part = page.partition(f"### {name}\n")[2].partition("\n### ")[0]
        missing = [field for field in schema.get("properties", {}) if f"**`{field}`**" not in part]
        assert (name, missing) == (name, [])


@pytest.mark.parametrize(
    ("source", "target", "place"),
    [
        ("client.md", "glossary.md", "glossary.md"),
        ("README.md", "../CHANGELOG.md", "repository/CHANGELOG.md"),
        ("adr/0001.md", "../architecture.md#rules", "architecture.md"),
        ("repository/README.md", "docs/client.md", "client.md"),
        (
            "repository/helm/img2img/README.md",
            "../examples/a.yaml",
            "repository/helm/examples/a.yaml",
        ),
        ("README.md", "adr", "adr/README.md"),
        ("models.md", "../proto/img2img/v1/job.proto", "reference/grpc.md"),
    ],
)
@pytest.mark.usefixtures("site")
def test_a_link_in_the_repository_has_a_place_in_the_site(
    source: str, target: str, place: str
) -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs mkdocs")
    import hooks

    assert hooks.site_path(hooks.repository_path(source, target)) == place


@pytest.mark.usefixtures("site")
def test_every_diagram_of_a_page_has_its_image() -> None:
    import diagrams

    assert [text for text in diagrams.texts() if not diagrams.path(text).is_file()] == []
    assert {diagrams.path(text) for text in diagrams.texts()} == set(diagrams.FOLDER.iterdir())


def test_no_page_of_the_site_loads_a_file_of_another_host() -> None:
    built = ROOT / "site"
    if not (built / "index.html").exists():
        pytest.skip("`make docs` builds the site")
    loaded = re.compile(r'<(?:script|img|iframe|source)\b[^>]*?\bsrc="?(https?:[^">\s]*)')
    loaded_links = re.compile(
        r"<link\b(?=[^>]*stylesheet|[^>]*preconnect)[^>]*href=\"?(https?:[^\">\s]*)"
    )
    found: list[tuple[Path, str]] = []
    for page in sorted(built.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        found += [(page, url) for url in loaded.findall(text) + loaded_links.findall(text)]
    assert found == []


def broken_links(site: Path) -> list[str]:
    """Returns the links of a built site that lead to no file of it."""
    found = []
    for page in site.rglob("*.html"):
        text = re.sub(r"<code.*?</code>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r'<[^>]*\b(?:src|href)="([^"#?]+)', text)
        local = (link for link in links if not re.match(r"[a-z]+:|/", link))
        found += [(page.name, link) for link in local if not (page.parent / link).exists()]
    return [f"{page}: {link}" for page, link in found]


def test_no_link_of_the_built_site_leads_to_a_missing_file() -> None:
    if not (ROOT / "site/index.html").exists():
        pytest.skip("`make docs` builds the site")
    assert broken_links(ROOT / "site") == []


LINKED = ("client", "openai-api", "http-contract", "v1-api")  # The references link to them.
CONFIG = f"""\
INHERIT: {ROOT}/mkdocs.yml
hooks: [{ROOT}/docs/site/hooks.py]
nav: [Start: [README.md, client.md, openai-api.md, http-contract.md, v1-api.md, reference]]
watch: []
plugins: []
"""


def test_make_docs_fails_on_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="`make docs` installs mkdocs")
    plan = ["make", "--dry-run", "--always-make", "--no-print-directory", "docs"]
    printed = subprocess.run(plan, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    pages = tmp_path / "docs"
    pages.mkdir()
    for name in LINKED:
        (pages / f"{name}.md").write_text(f"# {name}")
    config = tmp_path / "mkdocs.yml"
    references = "reference/grpc.md, reference/http.md"
    config.write_text(CONFIG.replace("reference]", f"{references}]"))
    links = ["nowhere.md", "client.md#nowhere", "../nowhere.py"]
    broken = " ".join(f"[link]({link})" for link in links)
    for text, code in (("[link](client.md#client)", 0), (broken, 1)):
        (pages / "README.md").write_text(f"# Page\n\n{text}\n")
        command = f"{printed.splitlines()[-1]} --config-file {config}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert [link for link in links if link not in done.stderr] == []
