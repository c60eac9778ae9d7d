"""A tenant's own S3 storage: its details, their rules, and the addresses of its files and links.

Parts of an address are joined with single slashes, in the path only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from img2img_server.domain.urls import encode_path, encode_query, is_http_url
from img2img_server.domain.violations import Reason, Violation, invalid_url, required, too_long

REALTIME = "realtime"  # the server type whose details the service uses
MAX_CHARACTERS = 1024
_UNRESERVED = "-_.~"  # SigV4 encodes all characters except letters, digits and these.


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageDetails:
    """Address and credentials of a tenant's S3 storage, named as in StorageSettings."""

    public_url: str
    region_name: str
    endpoint_url: str
    aws_access_key_id: str
    aws_secret_access_key: str
    image_directory: str
    bucket: str = ""

    def __repr__(self) -> str:  # This method keeps secrets out of logs and tracebacks.
        return f"StorageDetails(endpoint_url={self.endpoint_url!r}, …)"

    def file_link(self, name: str) -> str:
        """Returns the public address of a file: public_url / image_directory / name.

        The directory is left out when the path of public_url ends with it already.
        """
        base = urlsplit(self.public_url.strip())
        path, directory = _parts(base.path), _parts(self.image_directory)
        end = [unquote(part) for part in path[-len(directory) :]]
        rest = [] if end == directory else directory
        return _with_path(base, [*path, *map(_quoted, [*rest, name])])

    def upload_url(self, name: str) -> str:
        """Returns the upload address: endpoint_url / bucket (if given) / image_directory / name."""
        base = urlsplit(self.endpoint_url.strip())
        inside = [*_parts(self.bucket), *_parts(self.image_directory), name]
        return _with_path(base, [*_parts(base.path), *map(_quoted, inside)])


def validate_storage(details: StorageDetails) -> list[Violation]:
    """Returns every broken rule, in the order of the fields; empty when there is none."""
    found = (_violation(field.name, getattr(details, field.name)) for field in fields(details))
    return [violation for violation in found if violation]


def _violation(name: str, value: str) -> Violation | None:
    if not value:
        return None if name == "bucket" else required(name)
    if len(value) > MAX_CHARACTERS:
        return too_long(name, MAX_CHARACTERS)
    if not value.isprintable():
        message = f"{name} must not contain control characters"
        return Violation(name, Reason.INVALID_FORMAT, message)
    if name in ("public_url", "endpoint_url") and not _is_base_url(value, name):
        return invalid_url(name)
    if name in ("image_directory", "bucket") and {".", ".."} & set(_parts(value)):
        return Violation(
            name, Reason.INVALID_FORMAT, f"{name} must not contain . or .. as a folder"
        )
    return None


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
