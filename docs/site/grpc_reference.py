"""The gRPC reference: a page of all services, messages and enums with the comments of the proto
files. It is generated whenever the site is built.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.api import field_behavior_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parents[2] / "proto"
PACKAGE = ".img2img.v1."
STANDARD = "https://protobuf.dev/reference/protobuf/google.protobuf/#"
HEAD = """\
# gRPC reference

Generated from the comments of the proto files. The package is `img2img.v1`. The server supports
reflection, and [the Python client](../client.md) covers every call.
"""
ORDER = ("service", "admin_service", "job", "event")  # of the files on the page
# Numbers of fields in descriptor.proto, of which the paths of comments consist.
MESSAGES, ENUMS, SERVICES, FIELDS, NESTED, NESTED_ENUMS, METHODS, VALUES = 4, 5, 6, 2, 3, 4, 2, 2
Path_ = tuple[int, ...]


def render() -> str:
    """Returns the page as Markdown."""
    protos = [each for each in compiled().file if each.package == PACKAGE.strip(".")]
    protos.sort(key=lambda each: ORDER.index(Path(each.name).stem))
    files = [File(each) for each in protos]
    names = Names.of(files)
    parts = [HEAD]
    for file in files:
        for number, service in enumerate(file.proto.service):
            parts += service_part(file, (SERVICES, number), service, names)
    parts.append("## Messages\n")
    for file in files:
        for path, message, name in file.messages():
            parts += message_part(file, path, message, name, names)
    parts.append("## Enums\n")
    for file in files:
        for path, enum, name in file.enums():
            parts += enum_part(file, path, enum, name, names)
    return "\n".join(parts)


def compiled() -> FileDescriptorSet:
    """Returns the descriptors of all proto files with their comments.

    Raises:
        SystemExit: protoc found an error; it has printed the error.
    """
    include = Path(protoc.__file__).parent / "_proto"
    sources = sorted(str(path) for path in (PROTO / "img2img/v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "descriptors.binpb"
        options = [
            f"-I{PROTO}",
            f"-I{PROTO / 'third_party'}",
            f"-I{include}",
            "--include_source_info",
            "--include_imports",
        ]
        code = protoc.main(["protoc", *options, f"--descriptor_set_out={target}", *sources])
        if code:
            sys.exit(int(code))
        return FileDescriptorSet.FromString(target.read_bytes())


class File:
    """A proto file and its comments by the path of what they describe."""

    def __init__(self, proto: FileDescriptorProto) -> None:
        self.proto = proto
        locations = proto.source_code_info.location
        self.comments = {tuple(each.path): each.leading_comments for each in locations}

    def messages(self) -> Iterator[tuple[Path_, DescriptorProto, str]]:
        """Yields path, descriptor and name of every message, nested ones too."""
        for number, message in enumerate(self.proto.message_type):
            yield from self._messages((MESSAGES, number), message, message.name)

    def _messages(
        self, path: Path_, message: DescriptorProto, name: str
    ) -> Iterator[tuple[Path_, DescriptorProto, str]]:
        yield path, message, name
        for number, nested in enumerate(message.nested_type):
            if not nested.options.map_entry:
                yield from self._messages((*path, NESTED, number), nested, f"{name}.{nested.name}")

    def enums(self) -> Iterator[tuple[Path_, EnumDescriptorProto, str]]:
        """Yields path, descriptor and name of every enum, nested ones too."""
        for number, enum in enumerate(self.proto.enum_type):
            yield (ENUMS, number), enum, enum.name
        for path, message, name in self.messages():
            for number, enum in enumerate(message.enum_type):
                yield (*path, NESTED_ENUMS, number), enum, f"{name}.{enum.name}"


@dataclass(frozen=True)
class Names:
    """The anchors of the page by the names that comments use."""

    anchors: dict[str, str]

    @classmethod
    def of(cls, files: list[File]) -> Names:
        """Collects services, methods, messages, fields, enums and values."""
        found: dict[str, str] = {}
        for file in files:
            for service in file.proto.service:
                found[service.name] = anchor(service.name)
                found |= {method.name: anchor(method.name) for method in service.method}
            for _, message, name in file.messages():
                found[name] = anchor(name)
                for field in message.field:
                    found[f"{name}.{field.name}"] = f"{name}.{field.name}".lower()
            for _, enum, name in file.enums():
                found[name] = anchor(name)
                found |= {value.name: value.name.lower() for value in enum.value}
        return cls(found)

    def link(self, name: str) -> str:
        """Returns a link to a name, or the name as code if the page does not have it."""
        there = self.anchors.get(name)
        return f"[`{name}`](#{there})" if there else f"`{name}`"

    def text(self, comment: str) -> str:
        """Returns a comment as Markdown, with the names in it as links or as code."""
        text = re.sub(r"^ ", "", comment, flags=re.MULTILINE).strip()
        text = re.sub(r"([<>*\[\]])", r"\\\1", text)
        text = re.sub(r'"[^"\n]+"|[A-Za-z]\w*(?:\.\w+)*', self._marked, text)
        # A list needs an empty line before it.
        return re.sub(r"(?m)^((?!- | ).+)\n(?=- )", r"\1\n\n", text)

    def _marked(self, match: re.Match[str]) -> str:
        word = match[0]
        if word in self.anchors and (is_compound(word) or "." in word):
            return self.link(word)
        if word.startswith('"'):
            return word
        return f"`{word}`" if "_" in word or re.fullmatch("[A-Z]{8,}", word) else word


def is_compound(word: str) -> bool:
    """Returns whether a name cannot be an ordinary word, as CreateJob and LANE_BATCH."""
    return "_" in word or len(re.findall(r"[A-Z][a-z]", word)) > 1


def anchor(name: str) -> str:
    """Returns the anchor that the heading of a name gets."""
    return name.lower().replace(".", "")


def service_part(
    file: File, path: Path_, service: ServiceDescriptorProto, names: Names
) -> Iterator[str]:
    """Yields a service with its methods."""
    yield f"## {service.name}\n\n{names.text(file.comments.get(path, ''))}\n"
    for number, method in enumerate(service.method):
        yield f"### {method.name}\n\n{signature(method, names)}\n"
        yield f"{names.text(file.comments.get((*path, METHODS, number), ''))}\n"


def signature(method: MethodDescriptorProto, names: Names) -> str:
    """Returns request and response of a method."""
    request = names.link(method.input_type.removeprefix(PACKAGE))
    response = names.link(method.output_type.removeprefix(PACKAGE))
    streamed = "a stream of " if method.server_streaming else ""
    return f"Request: {request}. Response: {streamed}{response}."


def message_part(
    file: File, path: Path_, message: DescriptorProto, name: str, names: Names
) -> Iterator[str]:
    """Yields a message with its fields."""
    yield f"### {name}\n\n{names.text(file.comments.get(path, ''))}\n"
    if not message.field:
        yield "It has no fields.\n"
    for number, field in enumerate(message.field):
        comment = names.text(file.comments.get((*path, FIELDS, number), ""))
        facts = [field_type(message, field, names), f"field {field.number}"]
        behaviors = field.options.Extensions[field_behavior_pb2.field_behavior]
        names_of = map(field_behavior_pb2.FieldBehavior.Name, behaviors)
        facts += [each.lower().replace("_", " ") for each in names_of if each != "OPTIONAL"]
        if field.HasField("oneof_index") and not field.proto3_optional:
            facts.append(f"one of `{message.oneof_decl[field.oneof_index].name}`")
        term = f'<a id="{f"{name}.{field.name}".lower()}"></a>**`{field.name}`** {", ".join(facts)}'
        yield definition(term, comment)


def field_type(message: DescriptorProto, field: FieldDescriptorProto, names: Names) -> str:
    """Returns the type of a field, such as "repeated `Sample`"."""
    entries = {f".{each.name}": each for each in message.nested_type if each.options.map_entry}
    entry = next((each for end, each in entries.items() if field.type_name.endswith(end)), None)
    if entry is not None:
        key, value = (type_name(each, names) for each in entry.field)
        return f"map of {key} to {value}"
    name = type_name(field, names)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def type_name(field: FieldDescriptorProto, names: Names) -> str:
    """Returns the name of a single value's type, with a link if it has a description."""
    if not field.type_name:
        return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if field.type_name.startswith(".google.protobuf."):
        name = field.type_name.rpartition(".")[2]
        return f"[`{name}`]({STANDARD}{name.lower()})"
    return names.link(field.type_name.removeprefix(PACKAGE))


def enum_part(
    file: File, path: Path_, enum: EnumDescriptorProto, name: str, names: Names
) -> Iterator[str]:
    """Yields an enum with its values."""
    yield f"### {name}\n\n{names.text(file.comments.get(path, ''))}\n"
    for number, value in enumerate(enum.value):
        comment = names.text(file.comments.get((*path, VALUES, number), ""))
        term = f'<a id="{value.name.lower()}"></a>**`{value.name}`** {value.number}'
        yield definition(term, comment)


def definition(term: str, text: str) -> str:
    """Returns an entry of a definition list."""
    indented = text.replace("\n", "\n    ").replace("\n    \n", "\n\n")
    return f"{term}\n\n:   {indented}\n"
