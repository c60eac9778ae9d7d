"""The version and the address of the project: in pyproject.toml, and copied to other files.

    python -m release.identity                      reports copies that differ
    python -m release.identity --version 0.2.0      writes the version to all places
    python -m release.identity --repository URL     writes the address to all places

`client/pyproject.toml` reads its version from pyproject.toml, so it has no copy. After a new
version run `make gen` and `make gold`.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
# A domain that is reserved for examples.
PLACEHOLDER: Final = "example.com"


@dataclass(frozen=True, slots=True)
class Copies:
    """All places of a value in a file: the matches of a pattern, whose `@` stands for the value."""

    path: str
    pattern: str

    def found(self, root: Path, value: str) -> list[re.Match[str]]:
        """Returns the matches, which have the group `value`. `value`: its pattern."""
        text = (root / self.path).read_text(encoding="utf-8")
        pattern = self.pattern.replace("@", f"(?P<value>{value})")
        return list(re.finditer(pattern, text, re.MULTILINE))


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the project.

    Args:
        name: Its name in messages.
        pattern: The texts that it can be.
        rule: Describes them.
        copies: Its places. The first one is the source of the others.
    """

    name: str
    pattern: str
    rule: str
    copies: tuple[Copies, ...]

    def read(self, root: Path) -> str:
        """Returns the value at its source."""
        (match,) = self.copies[0].found(root, self.pattern)
        return match["value"]

    def faults(self, root: Path) -> list[str]:
        """Returns a sentence for each place that is missing or has another value."""
        expected, faults = self.read(root), []
        for copies in self.copies:
            values = {match["value"] for match in copies.found(root, self.pattern)}
            if not values:
                faults.append(f"{copies.path}: nothing matches {copies.pattern}")
            faults += [
                f"{copies.path}: the {self.name} is {value}, in pyproject.toml {expected}"
                for value in sorted(values - {expected})
            ]
        return faults

    def write(self, root: Path, value: str) -> None:
        """Writes another value to all places. Raises ValueError if it breaks the rule."""
        if not re.fullmatch(self.pattern, value):
            raise ValueError(f"the {self.name} {value!r} is not {self.rule}")
        for copies in self.copies:
            path = root / copies.path
            text = path.read_text(encoding="utf-8")
            for match in reversed(copies.found(root, self.pattern)):
                text = text[: match.start("value")] + value + text[match.end("value") :]
            path.write_text(text, encoding="utf-8")


VERSION: Final = Value(
    "version",
    r"\d+\.\d+\.\d+",
    "X.Y.Z, which Python packages, Helm charts and image tags all allow",
    (
        Copies("pyproject.toml", r'^version = "@"$'),
        Copies("pyproject.toml", r'"img2img-client==@"'),
        Copies("Dockerfile", r"^ARG VERSION=@$"),
        Copies("Dockerfile", r"img2img-service:@"),
        Copies("helm/img2img/Chart.yaml", r"^version: @$"),
        Copies("helm/img2img/Chart.yaml", r"^appVersion: @$"),
        Copies("helm/img2img/README.md", r"img2img-service:@"),
        Copies("helm/examples/argocd.yaml", r"targetRevision: v@$"),
        Copies("helm/examples/flux.yaml", r"tag: v@\}"),
        Copies("deploy/compose.yaml", r"IMAGE_TAG:-@\}"),
        Copies("deploy/.env.example", r"^#IMAGE_TAG=@$"),
        Copies("docs/operations.md", r"img2img-service:@"),
        Copies("docs/operations.md", r"`@-slim`"),
    ),
)
REPOSITORY: Final = Value(
    "address of the repository",
    r"https://[\w.-]+(?:/[\w-]+)+?",
    "https://HOST/OWNER/NAME",
    (
        Copies("pyproject.toml", r'^Repository = "@"$'),
        Copies("pyproject.toml", r'^Issues = "@/issues"$'),
        Copies("pyproject.toml", r'^Changelog = "@/blob/main/CHANGELOG\.md"$'),
        Copies("client/pyproject.toml", r'^Repository = "@"$'),
        Copies("client/pyproject.toml", r'^Issues = "@/issues"$'),
        Copies("client/pyproject.toml", r'^Changelog = "@/blob/main/CHANGELOG\.md"$'),
        Copies("README.md", r"^git clone @\.git$"),
        Copies("Dockerfile", r'image\.source="@"'),
        Copies("helm/img2img/Chart.yaml", r"^home: @$"),
        Copies("helm/examples/argocd.yaml", r"repoURL: @\.git$"),
        Copies("helm/examples/flux.yaml", r"url: @\.git$"),
    ),
)
VALUES: Final = (VERSION, REPOSITORY)


def faults(root: Path = ROOT) -> list[str]:
    """Returns a sentence for each copy that differs from pyproject.toml."""
    return [fault for value in VALUES for fault in value.faults(root)]


def is_published(root: Path = ROOT) -> bool:
    """Returns whether the project has an address of its own."""
    return PLACEHOLDER not in REPOSITORY.read(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", help="write this version, X.Y.Z, to all places")
    parser.add_argument("--repository", help="write this address, https://HOST/OWNER/NAME")
    chosen = parser.parse_args()
    try:
        for value, text in ((VERSION, chosen.version), (REPOSITORY, chosen.repository)):
            if text is not None:
                value.write(ROOT, text)
    except ValueError as error:
        parser.error(str(error))
    found = faults()
    print("\n".join(found or [f"{value.name}: {value.read(ROOT)}" for value in VALUES]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
