"""The HTTP reference: a page of all operations and types of the gateway's OpenAPI document. It is
generated whenever the site is built.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import grpc

from img2img_server.gateway.app import create_app
from img2img_server.settings import Settings
from img2img_server.testing.memory_blobs import MemoryBlobStore

Schema = dict[str, Any]
HEAD = """\
# HTTP reference

Generated from the [OpenAPI document](openapi.json) of the gateway, which a running gateway has at
`/openapi.json`; its page `/docs` lets you try requests. [The HTTP contract](../http-contract.md)
explains the endpoints that are compatible with ModelsLab. [The API below /v1](../v1-api.md) and
[OpenAI's Images API](../openai-api.md) have pages, too.
"""
TAGS = {
    "jobs": "Jobs",
    "img2img": "ModelsLab's image-to-image API",
    "openai": "OpenAI's Images API",
    "management": "Management",
    "files": "Files",
    "probes": "Probes",
}
BOUNDS = {
    "minimum": "at least {}",
    "maximum": "at most {}",
    "multipleOf": "a multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "maxItems": "at most {} items",
}


def render() -> tuple[str, str]:
    """Returns the page as Markdown and the document as JSON."""
    document = asyncio.run(openapi())
    schemas = document["components"]["schemas"]
    parts = [HEAD]
    for tag, heading in TAGS.items():
        parts.append(f"## {heading}\n")
        for operation, routes in grouped(document, tag):
            parts += operation_part(operation, routes)
    parts.append("## Types\n")
    for name in sorted(schemas):
        parts += type_part(name, schemas[name])
    return "\n".join(parts), json.dumps(document, indent=2)


async def openapi() -> Schema:
    """Returns the document of a gateway with default settings."""
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:  # nothing is called
        document: Schema = create_app(Settings(), channel, MemoryBlobStore()).openapi()
        return document


def grouped(document: Schema, tag: str) -> list[tuple[Schema, list[tuple[str, str]]]]:
    """Returns the operations of a tag, each with its methods and paths: several paths can lead to
    one operation.
    """
    found: dict[str, tuple[Schema, list[tuple[str, str]]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            [own] = operation["tags"]
            if own not in TAGS:
                raise ValueError(f"add a heading for the tag {own!r} of {path} to TAGS")
            if own == tag:
                entry = found.setdefault(operation["summary"], (operation, []))
                entry[1].append((method.upper(), path))
    return list(found.values())


def operation_part(operation: Schema, routes: list[tuple[str, str]]) -> Iterator[str]:
    """Yields an operation: its paths, parameters, body and responses."""
    yield f"### {operation['summary']}\n"
    yield "\n".join(f"- `{method} {path}`" for method, path in routes) + "\n"
    yield f"{text(operation.get('description', ''))}\n"
    names = [re.findall(r"{(\w+)}", path) for _, path in routes]
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path" and not any(parameter["name"] in each for each in names):
            continue
        facts = [f"in the {parameter['in']}", kind(parameter["schema"])]
        facts += ["required"] if parameter.get("required") else []
        description = parameter.get("description") or parameter["schema"].get("description", "")
        yield entry(parameter["name"], facts, description)
    for media_type, body in operation.get("requestBody", {}).get("content", {}).items():
        yield f"Body ({media_type}): {kind(body['schema'])}\n"
        if "example" in body:
            yield f"```json\n{json.dumps(body['example'], indent=2)}\n```\n"
    yield "| status | response | body |\n| --- | --- | --- |"
    for status, response in sorted(operation["responses"].items()):
        bodies = [kind(each.get("schema", {})) for each in response.get("content", {}).values()]
        yield f"| {status} | {cell(response['description'])} | {cell(', '.join(bodies))} |"
    yield ""


def type_part(name: str, schema: Schema) -> Iterator[str]:
    """Yields a type with its fields."""
    yield f"### {name}\n\n{text(schema.get('description', ''))}\n"
    required = schema.get("required", [])
    for field, details in schema.get("properties", {}).items():
        facts = [kind(details), *(["required"] if field in required else []), *bounds(details)]
        default = details.get("default")
        if default not in (None, "", [], {}):
            facts.append(f"default `{json.dumps(default)}`")
        yield entry(field, facts, details.get("description", ""))
    others = schema.get("oneOf") or schema.get("anyOf")
    if others:
        yield f"One of: {', '.join(kind(each) for each in others)}.\n"


def kind(schema: Schema) -> str:
    """Returns a type as a reader names it, with links to the types of the page."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})"
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            kinds = [kind(each) for each in schema[word] if each.get("const") != ""]
            return " or ".join(dict.fromkeys(kinds))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    if schema.get("type") == "array":
        return f"array of {kind(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict) and "properties" not in schema:
        return f"object with values of type {kind(schema['additionalProperties'])}"
    found = schema.get("type", "any")
    return " or ".join(found) if isinstance(found, list) else str(found)


def bounds(schema: Schema) -> list[str]:
    """Returns sentences about the limits of a value."""
    for each in (schema, *schema.get("anyOf", [])):
        found = [words.format(each[key]) for key, words in BOUNDS.items() if key in each]
        if found:
            return found
    return []


def entry(name: str, facts: list[str], description: str) -> str:
    """Returns an entry of a definition list."""
    indented = text(description).replace("\n", "\n    ").replace("\n    \n", "\n\n")
    return f"**`{name}`** {', '.join(facts)}\n\n:   {indented or '&nbsp;'}\n"


def text(description: str) -> str:
    """Returns a description as Markdown in which a list has an empty line before it."""
    return re.sub(r"(?m)^((?!- | ).+)\n(?=- )", r"\1\n\n", description.strip())


def cell(words: str) -> str:
    """Returns words as the content of a table's cell."""
    return " ".join(words.split()).replace("|", "&#124;")
