"""Writes the values.schema.json of the chart and the table in its README from values and settings.

Run by `make gen`; `make check` passes --check.

    # -- The meaning, for the table and the schema.
    # @schema {"minimum": 1}      rules beyond the type of the default, merged into the schema
    replicas: 2
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from img2img_server.settings import PREFIX, Settings

CHART = Path(__file__).resolve().parent / "img2img"
BEGIN, END = "<!-- values: begin, written by `make gen` -->\n", "<!-- values: end -->\n"
KEY = re.compile(r"^( *)([\w./-]+):")
COMMENT = re.compile(r"^ *# ?(.*)$")
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}

# Settings that the chart derives from other values, so that each has one place.
# fmt: off
OWNED = frozenset({
    "grpc_host", "grpc_port", "http_host", "http_port", "metrics_host", "metrics_port",
    "api_address", "api_ca_file", "public_base_url", "tls_cert_file", "tls_key_file", "nats_url",
    "nats_user", "nats_password", "nats_token", "nats_creds_file", "nats_ca_file",
    "nats_cert_file", "nats_key_file", "nats_replicas", "s3_endpoint_url", "s3_region", "s3_bucket",
    "s3_access_key", "s3_secret_key", "s3_session_token", "api_keys_file", "storage_keys",
    "webhook_secret", "model", "device", "worker_name", "drain_seconds", "compile_cache_dir",
})
# fmt: on
# Settings that only `local` uses.
LOCAL = frozenset({"dev_key", "state_dir"})
NEVER_NULL = {("settings",), ("env",)}  # maps that templates read without a default
POOL = "workerDefaults"  # A pool in `workers` has some of the same values.

Path_ = tuple[str, ...]


class Comments:
    """The comments of values.yaml by the path of the key below them."""

    def __init__(self, text: str) -> None:
        self.docs: dict[Path_, str] = {}
        self.schemas: dict[Path_, dict[str, Any]] = {}
        self.order: list[Path_] = []
        stack: list[tuple[int, str]] = []
        pending: list[str] = []
        for line in text.splitlines():
            if comment := COMMENT.match(line):
                pending.append(comment[1])
            elif key := KEY.match(line):
                indent = len(key[1])
                stack = [*(entry for entry in stack if entry[0] < indent), (indent, key[2])]
                self._keep(tuple(name for _, name in stack), pending)
                pending = []
            else:
                pending = []

    def _keep(self, path: Path_, lines: list[str]) -> None:
        self.order.append(path)
        words: list[str] = []
        for line in lines:
            if line.startswith("@schema "):
                self.schemas[path] = json.loads(line.removeprefix("@schema "))
            elif line.startswith("-- "):
                words = [line.removeprefix("-- ")]
            elif words:
                words.append(line)
        if words:
            self.docs[path] = " ".join(words)


def schema_of(value: Any, path: Path_, comments: Comments) -> dict[str, Any]:
    """Returns the schema of a value; objects are closed unless their comment opens them."""
    said = comments.schemas.get(path, {})
    described = {"description": comments.docs[path]} if path in comments.docs else {}
    if "$ref" in said:
        return described | said
    if not isinstance(value, dict):
        return described | {"type": TYPES[type(value)]} | said
    if not value:
        assert "additionalProperties" in said, f"{'.'.join(path)}: say what may be in it"
        return described | {"type": "object"} | said
    children = {key: schema_of(value[key], (*path, key), comments) for key in value}
    closed = {"type": "object", "additionalProperties": False, "properties": children}
    return described | closed | (needed(value, path, comments) if path[0] != POOL else {})


def needed(value: dict[str, Any], path: Path_, comments: Comments) -> dict[str, Any]:
    """Returns a schema that rejects a null for a group of values, because templates read its inner
    values. Maps that a comment opens can be null."""
    groups = [
        key
        for key, inner in value.items()
        if isinstance(inner, dict)
        and ((*path, key) not in comments.schemas or (*path, key) in NEVER_NULL)
    ]
    return {"required": groups} if groups else {}


def settings_schema() -> dict[str, Any]:
    """Returns the schema of `settings`: every setting that the chart does not set itself."""
    known = Settings.model_json_schema()["properties"]
    for field in known.values():
        field["description"] = " ".join(field["description"].split())
    kept = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "pattern", "description")
    free = {
        PREFIX + name.upper(): {key: known[name][key] for key in kept if key in known[name]}
        for name in known
        if name not in OWNED | LOCAL
    }
    return {"type": "object", "additionalProperties": False, "properties": free}


def definitions() -> dict[str, Any]:
    """Returns the schemas that several values share."""
    # A null removes the default.
    amounts = {
        "type": ["object", "null"],
        "additionalProperties": {"type": ["string", "number", "null"]},
    }
    return {
        "settings": settings_schema(),
        "resources": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {"requests": amounts, "limits": amounts},
        },
        "topologySpread": {
            "type": "object",
            "additionalProperties": {"enum": ["ScheduleAnyway", "DoNotSchedule", None]},
        },
        "workers": {
            "type": "object",
            "propertyNames": {"pattern": "^[a-z0-9]([a-z0-9-]{0,12}[a-z0-9])?$"},
            "additionalProperties": {"$ref": "#/definitions/pool"},
        },
    }


def render_schema(text: str) -> str:
    """Returns the text of values.schema.json."""
    comments, values = Comments(text), yaml.safe_load(text)
    properties = {key: schema_of(values[key], (key,), comments) for key in values}
    pool = properties[POOL]
    properties[POOL] = {
        "allOf": [{"$ref": "#/definitions/pool"}, needed(values[POOL], (POOL,), comments)]
    }
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart img2img",
        "type": "object",
        "additionalProperties": False,
        **needed(values, (), comments),
        # `global` belongs to Helm: charts that contain this chart set it.
        "properties": {**properties, "global": {"type": "object"}},
        "definitions": definitions() | {"pool": pool},
    }
    return json.dumps(schema, indent=2) + "\n"


def render_table(text: str) -> str:
    """Returns the table of the README: name, default, meaning."""
    comments, values = Comments(text), yaml.safe_load(text)
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    for path in comments.order:
        if path not in comments.docs:
            continue
        value = values
        for key in path:
            value = value[key]
        default = json.dumps(value) if value != "" else "empty"
        cells = (f"`{'.'.join(path)}`", f"`{default}`" if value != "" else default)
        meaning = comments.docs[path].replace("|", "&#124;")
        lines.append(f"| {cells[0]} | {cells[1]} | {meaning} |")
    return "\n".join(lines) + "\n"


def render_readme(text: str, readme: str) -> str:
    """Returns the README with the new table."""
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{render_table(text)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    """Returns 1 when --check finds a file that is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    check = parser.parse_args().check
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    schema, readme = CHART / "values.schema.json", CHART / "README.md"
    wanted = {
        schema: render_schema(text),
        readme: render_readme(text, readme.read_text(encoding="utf-8")),
    }
    for path, content in wanted.items():
        if not check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            print(f"helm/img2img/{path.name} is not current: run `make gen`", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
