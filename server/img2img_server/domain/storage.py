"""A tenant's own S3 storage: its details, their rules, and where files and links of it lie.

HTTP contract, section 10. Joining: slashes are trimmed and parts joined with single ones, in the
path only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from img2img_server.domain.params import Violation
from img2img_server.domain.urls import encode_path, encode_query, is_http_url

REALTIME = "realtime"  # the only server type that this service runs
# Other types of the contract: their details are kept, nothing uses them.
WITHOUT_EFFECT = frozenset(
    {
        "text_to_image",
        "image_editing",
        "voice_cloning",
        "text_to_3d",
        "video",
        "face_gen",
        "deepfake",
        "super_resolution",
        "flux",
        "flux_headshot",
        "interior",
        "qwen",
        "qwen_tts",
        "flux_kontext_dev",
        "image_to_video_ultra",
        "z_image_turbo",
    }
)
MAX_CHARACTERS = 1024
_UNRESERVED = "-_.~"  # beside letters and digits: what SigV4 does not encode


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDetails:
    """Where a tenant's files go and how to get in. Field names are those of the contract."""

    public_url: str
    region_name: str
    endpoint_url: str
    aws_access_key_id: str
    aws_secret_access_key: str
    image_directory: str
    bucket: str = ""

    def __repr__(self) -> str:  # it ends up in logs and tracebacks
        return f"StorageDetails(endpoint_url={self.endpoint_url!r}, …)"

    def file_link(self, name: str) -> str:
        """Public address of a file: public_url / image_directory / name.

        The directory is left out when the path of public_url ends with it already.
        """
        base = urlsplit(self.public_url.strip())
        path, directory = _parts(base.path), _parts(self.image_directory)
        end = [unquote(part) for part in path[-len(directory) :]]
        rest = [] if end == directory else directory
        return _with_path(base, [*path, *map(_quoted, [*rest, name])])

    def upload_url(self, name: str) -> str:
        """Where a file is PUT: endpoint_url / bucket (if given) / image_directory / name."""
        base = urlsplit(self.endpoint_url.strip())
        inside = [*_parts(self.bucket), *_parts(self.image_directory), name]
        return _with_path(base, [*_parts(base.path), *map(_quoted, inside)])


def validate_storage(details: StorageDetails, deploy_type: str) -> list[Violation]:
    """Every broken rule; empty when there is none."""
    return list(_violations(details, deploy_type))


def _violations(details: StorageDetails, deploy_type: str) -> Iterator[Violation]:
    yield from validate_deploy_type(deploy_type)
    for field in fields(details):
        name, value = field.name, getattr(details, field.name)
        if not value:
            if name != "bucket":
                yield Violation(name, f"{name} is required")
        elif len(value) > MAX_CHARACTERS:
            yield Violation(name, f"{name} must not be longer than {MAX_CHARACTERS} characters")
        elif not value.isprintable():
            yield Violation(name, f"{name} must not contain control characters")
        elif name in ("public_url", "endpoint_url") and not _is_base_url(value, name):
            yield Violation(name, f"{name} must be a valid URL")
        elif name in ("image_directory", "bucket") and {".", ".."} & set(_parts(value)):
            yield Violation(name, f"{name} must not contain . or .. as a folder")


def validate_deploy_type(deploy_type: str) -> list[Violation]:
    """Whether it is a type of the contract."""
    if deploy_type == REALTIME or deploy_type in WITHOUT_EFFECT:
        return []
    return [Violation("deploy_type", "deploy_type is invalid")]


def _is_base_url(text: str, name: str) -> bool:
    if not is_http_url(text):
        return False
    url = urlsplit(text)
    extra = url.fragment or (url.query and name == "endpoint_url")
    return not extra


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _quoted(part: str) -> str:
    return quote(part, safe=_UNRESERVED)


def _with_path(base: SplitResult, parts: list[str]) -> str:
    path = encode_path("/" + "/".join(parts))
    return urlunsplit((base.scheme, base.netloc, path, encode_query(base.query), ""))
