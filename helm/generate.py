"""Writes the chart's values.schema.json, templates/_empty.tpl and the table in its README from
values and settings.

Run by `make gen`; `make check` passes --check.

    # -- The meaning, for the table and the schema.
    # @schema {"minimum": 1}      rules beyond the type of the default, merged into the schema
    replicas: 2

A null takes out every value that is empty by default, is a switch, or has `"nullable": true` in its
rules. The schema rejects it for all others.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from img2img_server.setting_names import PREFIX
from img2img_server.settings import Settings, with_variables

CHART = Path(__file__).resolve().parent / "img2img"
BEGIN, END = "<!-- values: begin, written by `make gen` -->\n", "<!-- values: end -->\n"
KEY = re.compile(r"^( *)([\w./-]+):")
ALERT = re.compile(r"\b(Img2Img\w+)")
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
    "stream_token_keys", "models_file",
    "webhook_secret", "model", "device", "worker_name", "drain_seconds", "compile_cache_dir",
})
# fmt: on
# Settings that only `local` uses.
LOCAL = frozenset({"dev_key", "state_dir"})
NULLABLE = "nullable"  # marks, in a comment, a number or text that a null can take out
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
    said = {key: rule for key, rule in comments.schemas.get(path, {}).items() if key != NULLABLE}
    described = {"description": comments.docs[path]} if path in comments.docs else {}
    if "$ref" in said:
        return described | said
    if not isinstance(value, dict):
        schema = {"type": TYPES[type(value)]} | said
        return described | (or_null(schema) if is_nullable(value, path, comments) else schema)
    if not value or "additionalProperties" in said:
        assert "additionalProperties" in said, f"{'.'.join(path)}: say what may be in it"
        texts = said["additionalProperties"] == {"type": "string"}
        opened = {"additionalProperties": {"type": ["string", "null"]}} if texts else {}
        return described | or_null({"type": "object"} | said | opened)
    children = {key: schema_of(value[key], (*path, key), comments) for key in value}
    schema = {"type": "object", "additionalProperties": False, "properties": children}
    if path[0] == POOL:
        return described | (or_null(schema) if is_nullable(value, path, comments) else schema)
    return described | schema | needed(value, path, comments)


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema that also accepts null, which takes the default out."""
    if kind := schema.get("type"):
        kinds = kind if isinstance(kind, list) else [kind]
        schema = schema | {"type": [*kinds, *(["null"] if "null" not in kinds else [])]}
    return schema | ({"enum": [*schema["enum"], None]} if "enum" in schema else {})


def is_nullable(value: Any, path: Path_, comments: Comments) -> bool:
    """Returns whether a value can be taken out: if it is empty, a switch, a group with a switch, or
    if it is marked."""
    said = comments.schemas.get(path, {})
    if isinstance(value, dict):
        if not value or "$ref" in said or "additionalProperties" in said:
            return True
        # A pool can turn on what workerDefaults has taken out, and needs the other values then.
        off = "enabled" in value and path[0] != POOL
        return off or not needed(value, path, comments)
    if isinstance(value, list):
        return "minItems" not in said
    marked = NULLABLE in said or "null" in said.get("type", ())
    return marked or value == "" or isinstance(value, bool)


def needed(value: dict[str, Any], path: Path_, comments: Comments) -> dict[str, Any]:
    """Returns a schema that rejects a null for inner values that templates cannot do without. A
    group of values is one of them if it contains one."""
    names = [key for key in value if not is_nullable(value[key], (*path, key), comments)]
    groups = [
        key
        for key in value
        if path[:1] == (POOL,) and isinstance(value[key], dict)
        if not {"$ref", "additionalProperties"} & set(comments.schemas.get((*path, key), {}))
    ]
    inner = {key: each for key in groups if (each := needed(value[key], (*path, key), comments))}
    found: dict[str, Any] = {"required": names} if names else {}
    return found | ({"properties": inner} if inner else {})


def emptied(value: Any, path: Path_, comments: Comments) -> Any:
    """Returns what templates read for a value that is taken out; None if there is no such value."""
    if isinstance(value, dict):
        inner = {key: emptied(value[key], (*path, key), comments) for key in value}
        opened = {"$ref", "additionalProperties"} & set(comments.schemas.get(path, {}))
        return {} if opened else {key: each for key, each in inner.items() if each is not None}
    if type(value) in (int, float) or not is_nullable(value, path, comments):
        return None
    return type(value)()


def render_empty(text: str) -> str:
    """Returns the text of templates/_empty.tpl."""
    comments, values = Comments(text), yaml.safe_load(text)
    empty = {key: emptied(values[key], (key,), comments) for key in values}
    body = yaml.dump(
        {key: each for key, each in empty.items() if each is not None}, Dumper=_NoAliases
    )
    return (
        "{{/* What templates read for values that a null takes out. Written by `make gen`. */}}\n"
        f'{{{{- define "img2img.empty" -}}}}\n{body}{{{{- end -}}}}\n'
    )


class _NoAliases(yaml.SafeDumper):
    """Writes repeated values in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def settings_schema() -> dict[str, Any]:
    """Returns the schema of `settings`: every setting that the chart does not set itself."""
    known = Settings.model_json_schema()["properties"]
    for field in known.values():
        field["description"] = with_variables(" ".join(field["description"].split()))
    kept = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "pattern", "description")
    free = {
        PREFIX + name.upper(): or_null(
            {key: known[name][key] for key in kept if key in known[name]}
        )
        for name in known
        if name not in OWNED | LOCAL
    }
    return {"type": ["object", "null"], "additionalProperties": False, "properties": free}


def env_schema() -> dict[str, Any]:
    """Returns the schema of environment variables. Variables of the service must be settings."""
    names = [PREFIX + name.upper() for name in Settings.model_fields if name not in LOCAL]
    return {
        "type": ["array", "null"],
        "items": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                "name": {
                    "anyOf": [
                        {"type": "string", "not": {"pattern": f"^{PREFIX}"}},
                        {"enum": names},
                    ]
                },
                "value": {"type": "string"},
                "valueFrom": {"type": "object"},
            },
        },
    }


def alerts_schema() -> dict[str, Any]:
    """Returns the schema of the changes of single alerts."""
    text = (CHART / "templates" / "monitoring" / "prometheusrule.yaml").read_text(encoding="utf-8")
    change = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "enabled": {"type": "boolean"},
            "for": {"type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    return {
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": dict.fromkeys(sorted(set(ALERT.findall(text))), change),
    }


def definitions() -> dict[str, Any]:
    """Returns the schemas that several values share."""
    # A null removes the default.
    amounts = {
        "type": ["object", "null"],
        "additionalProperties": {"type": ["string", "number", "null"]},
    }
    return {
        "settings": settings_schema(),
        "env": env_schema(),
        "alerts": alerts_schema(),
        "resources": {
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {"requests": amounts, "limits": amounts},
        },
        "topologySpread": {
            "type": ["object", "null"],
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
        CHART / "templates" / "_empty.tpl": render_empty(text),
        schema: render_schema(text),
        readme: render_readme(text, readme.read_text(encoding="utf-8")),
    }
    for path, content in wanted.items():
        if not check:
            path.write_text(content, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            print(
                f"helm/img2img/{path.relative_to(CHART)} is not current: run `make gen`",
                file=sys.stderr,
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
