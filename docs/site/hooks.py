"""Hooks of mkdocs: the generated references, and links to files elsewhere in the repository.

The pages in docs/ are written for readers of the repository too, so their links are relative to
their place in it. A linked file outside docs/ is added to the site below repository/, and every
link is rewritten to the place of its target in the site.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import diagrams
import grpc_reference
import http_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
OUTSIDE = "repository/"
PROTOCOL = "proto/img2img/v1"
GRPC, HTTP = "reference/grpc.md", "reference/http.md"
log = logging.getLogger("mkdocs.hooks.img2img")  # strict mode counts the warnings of mkdocs.*
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\\)\]\((?P<target>[^)\s]+)(?P<title> \"[^\"]*\")?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Expands the patterns in the navigation: `adr/*` is every page of the folder."""
    for section in config.nav or ():
        for pages in section.values():
            for entry in filter(lambda each: isinstance(each, dict), pages):
                [(title, value)] = entry.items()
                if isinstance(value, list):
                    found = (ROOT / DOCS).glob(value[0] + ".md")
                    names = sorted(file.relative_to(ROOT / DOCS).as_posix() for file in found)
                    entry[title] = [name for name in names if "README" in name]
                    entry[title] += [name for name in names if "README" not in name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated references and every linked file outside docs/."""
    files.append(File.generated(config, GRPC, content=grpc_reference.render()))
    http, document = http_reference.render()
    files.append(File.generated(config, HTTP, content=http))
    files.append(File.generated(config, "reference/openapi.json", content=document))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        for target in linked(page.content_string):
            path = file_of(repository_path(page.src_uri, target))
            uri = site_path(path)
            if files.get_file_from_path(uri) or not uri.startswith(OUTSIDE):
                continue
            if (ROOT / path).is_file():
                added = File.generated(config, uri, abs_src_path=str(ROOT / path))
            elif (ROOT / path).parent.is_dir() and path.endswith("/README.md"):
                added = File.generated(
                    config, uri, content=listing(path.removesuffix("/README.md"))
                )
            else:
                log.warning("%s links to %s, which is no file", page.src_uri, target)
                continue
            files.append(added)
            waiting += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links to their targets in the site, and diagrams to images."""
    source = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if not is_local(target):
            return match[0]
        split = urlsplit(target)
        uri = site_path(repository_path(source, target))
        place = posixpath.relpath(uri, posixpath.dirname(source) or ".")
        anchor = f"#{split.fragment}" if split.fragment else ""
        return f"]({place}{anchor}{match['title'] or ''})"

    markdown = diagrams.as_images(markdown, source)
    parts = list(split_fences(markdown))
    return "".join(text if is_code else LINK.sub(rewritten, text) for is_code, text in parts)


def split_fences(markdown: str) -> Iterator[tuple[bool, str]]:
    """Yields the parts of a page in order, and whether each is a fenced block."""
    start = 0
    for fence in FENCE.finditer(markdown):
        yield False, markdown[start : fence.start()]
        yield True, fence[0]
        start = fence.end()
    yield False, markdown[start:]


def is_local(target: str) -> bool:
    """Returns whether a link leads to another file of the repository."""
    split = urlsplit(target)
    return not (split.scheme or split.netloc) and bool(split.path)


def linked(markdown: str) -> Iterator[str]:
    """Yields the targets of the links to files of the repository."""
    for is_code, text in split_fences(markdown):
        if not is_code:
            yield from filter(is_local, (match["target"] for match in LINK.finditer(text)))


def repository_path(source: str, target: str) -> str:
    """Returns the path in the repository of a link in the page `source` of the site."""
    page = source.removeprefix(OUTSIDE) if source.startswith(OUTSIDE) else DOCS + source
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), urlsplit(target).path))


def file_of(path: str) -> str:
    """Returns the path of the page that a link to a folder shows; it can be missing."""
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def listing(folder: str) -> str:
    """Returns a page with links to the files of a folder that has no page."""
    names = sorted(each.name for each in (ROOT / folder).iterdir() if each.is_file())
    return "\n".join([f"# {folder}\n", *(f"- [{name}]({name})" for name in names), ""])


def site_path(path: str) -> str:
    """Returns the place of a file or folder of the repository in the site."""
    if path.startswith(PROTOCOL):
        return GRPC
    path = file_of(path)
    return path.removeprefix(DOCS) if path.startswith(DOCS) else OUTSIDE + path
