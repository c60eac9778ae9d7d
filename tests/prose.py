"""Finds words and forms of sentences that CONTRIBUTING.md forbids, in prose, code and commits.

`python -m tests.prose FOLDER...` lists them; without a folder, those of the whole repository.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.readme import ROOT

# Words that are forbidden in names too, and what to say instead.
NAMES = {
    r"pictures?": "image",
    r"dear": "expensive",
    r"wish(es)?": "request, setting",
    r"told": "reported, returned, sent",
    r"mend(s|ed|ing)?": "fix, retry, correct",
    r"hears?|heard": "receive, notice",
    r"bury|buries|buried": "dead-letter",
    r"company": "batching, other rows",
    r"patience|patient": "timeout, waiting time",
    r"welcomes?|welcomed": "accept, activate",
    r"anew": "again, from the beginning",
    r"beside": "next to, in addition to",
    r"doors?": "API, interface",
    r"dialects?": "mode, response format",
    r"goodbye": "final message",
    r"obeys?|obeyed": "execute a command",
    r"nobody|somebody|anybody|everybody|anyone|everyone|someone": "the caller, no client",
    r"whoever|whomever|whom": "the caller, the client, the code that ...",
}
# Phrases that are forbidden in sentences.
PHRASES = {
    r"tell|tells|telling": "report, return, say",
    r"(for|of|by|to|from|with|and|that|but|so|if|when|or|than|until|unless|because) who": (
        "the caller who, the client that"
    ),
    r"(^|[.;:] )who \w+": "the caller, the client, the operator",
    r"rings|rang|rung": "notify",
    r"lies|lie|lay|lain": "is, is stored",
    r"(go|goes|going|went) on": "continue",
    r"held against": "compared with, checked against",
    r"(hand|hands|handed|handing)( \w+){0,3} back": "requeue, return",
    r"(call|calls|called|calling) off": "cancel",
    r"(let|lets|letting)( \w+)? go": "release, requeue",
    r"for good": "permanently",
    r"of ours": "our",
    r"the bus": "NATS",
    r"he|him|his|she|her|hers": "the caller, they",
    r"(a|the|our|last|first|final) word (of|for|from|to|itself|is|may)": "the message",
    r"(in|without)( a| our| its)?( own)? words?( of)?": "as a sentence",
    r"last words?": "last message, last log line",
    r"(five|six|twenty|one|several|other|many|each) looks?": "style",
    r"in vain": "without effect",
    r"shall": "must, will",
    r"(an|the|its|their|every|no|this|other|of|HTTP|final|whose|which) answers?": "response",
    r"(stands?|stood) (in|behind|before|there|on)": "is in, comes before",
    r"as (it|they) stands?": "unchanged",
    r"the way of": "the life of, how ... works",
    r"(become|becomes|became) of": "happens to",
    r"the dear|the cheap": "name the thing",
    r"foreseen": "expected",
    r"what is(?! wrong)": "name the thing",
}
ALLOWED = re.compile(r"dead[ _-]?letters?|key ring|keyring|string|ringing", re.IGNORECASE)
# A function's docstring begins with a verb in the third person; these words look like one.
NO_VERBS = frozenset(
    {
        "As",
        "Always",
        "Arguments",
        "Bytes",
        "Details",
        "Errors",
        "Events",
        "Fields",
        "Files",
        "Has",
        "Headers",
        "Is",
        "Its",
        "Jobs",
        "Keys",
        "Less",
        "Lines",
        "Models",
        "Options",
        "Others",
        "Ours",
        "Paths",
        "Perhaps",
        "Permissions",
        "Pixels",
        "Plus",
        "Rows",
        "Samples",
        "Seconds",
        "Sentences",
        "Settings",
        "Sizes",
        "Steps",
        "Theirs",
        "This",
        "Tokens",
        "Types",
        "Values",
        "Was",
        "Weights",
        "Whereas",
        "Words",
        "Workers",
    }
)
# Sections of these documents are not sections of our contract.
NO_RULE = re.compile(r"RFC|WHATWG|PNG", re.ASCII)
SECTION = re.compile(r"\b[Ss]ections? [1-9]")
QUESTION = re.compile(r"(?:^|(?<=[.:!] ))(What|Who|Whom|Whose) [^.?!]*[.!:]")
CODE = re.compile(r"``[^`]*``|`[^`]*`|https?://\S+|\[[^\]]*\]\([^)]*\)")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".tpl", ".txt", ".js", ".html", ".css"}
SLASHES = {".proto", ".ts", ".mjs", ".java"}  # files whose comments begin with //
PLACES = (
    "server",
    "client",
    "proto",
    "docs",
    "helm",
    "benchmarks",
    "examples",
    "models",
    "tests",
    ".ci",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "Dockerfile",
    "pyproject.toml",
)
LEFT_OUT = re.compile(
    r"proto/gen/|proto/third_party/google/|tests/golden/|/assets/.*\.svg|LICENSE|constraints|/NOTICE|checks|models/recipe/words.py"
)
FIRST_COMMIT = "268a36e"  # Subjects are checked from this commit on.
SUBJECT_CHARACTERS = 72
NO_IMPERATIVES = re.compile(r"\w+(?<!s)s$|\w+(?<!e)ed$|\w{3,}ing$")
IMPERATIVES = frozenset({"Bring", "Embed", "Shed", "String"})


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of prose: a docstring, a comment, a text in code, a line of a page or a name."""

    path: str
    line: int
    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A forbidden word or form, and what to write instead."""

    path: str
    line: int
    found: str
    instead: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.found!r}, write: {self.instead} | {self.text}"


@cache
def _words(names_only: bool) -> re.Pattern[str]:
    table = NAMES if names_only else NAMES | PHRASES
    return re.compile(r"\b(?:" + "|".join(f"(?:{each})" for each in table) + r")\b", re.IGNORECASE)


def _instead(found: str) -> str:
    table = NAMES | PHRASES
    return next(say for each, say in table.items() if re.fullmatch(each, found, re.IGNORECASE))


@cache
def _is_good_name(name: str) -> bool:
    words = ALLOWED.sub("", re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name))
    return not _words(names_only=True).search(words)


def check(passage: Passage) -> Iterator[Finding]:
    """Yields the forbidden words and forms of a passage."""
    if passage.kind == "name" and _is_good_name(passage.text):
        return
    text = " ".join(passage.text.split())

    def finding(found: str, instead: str) -> Finding:
        at = max(0, text.find(found) - 40)
        return Finding(passage.path, passage.line, found, instead, text[at : at + 110])

    prose = ALLOWED.sub("", CODE.sub("CODE", text))
    if passage.kind == "name":
        prose = ALLOWED.sub("", re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", text))
    for match in _words(passage.kind == "name").finditer(prose):
        yield finding(match.group(), _instead(match.group()))
    if passage.kind == "function" and not _begins_with_a_verb(text):
        yield finding(text.split(" ")[0], "a verb in the third person: Returns, Raises")
    if passage.kind in ("function", "docstring", "comment", "text"):
        for match in QUESTION.finditer(prose):
            yield finding(match.group(1), "a noun instead of a question without question mark")
    if passage.kind != "name" and SECTION.search(prose) and not NO_RULE.search(prose):
        yield finding("section", "the anchor of a rule in docs/http-contract.md")


def _begins_with_a_verb(text: str) -> bool:
    first = re.match(r"[A-Za-z-]*", text.lstrip())
    word = first.group() if first else ""
    return word.endswith("s") and word[:1].isupper() and word not in NO_VERBS


def passages(path: Path, name: str) -> Iterator[Passage]:
    """Yields the prose of a file and, of Python, its names."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(name, text)
    elif path.suffix == ".md":
        yield from _page(name, text)
    elif path.suffix in SLASHES:
        yield from _comments(name, text, "//")
    elif path.suffix in (".js", ".html", ".css", ".tpl") or "{{" in text:
        for number, line in enumerate(text.splitlines(), 1):
            yield Passage(name, number, line, "line")
    else:
        yield from _comments(name, text, "#")


def _python(name: str, text: str) -> Iterator[Passage]:
    docstrings, texts = set(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            texts.append(node)
        elif isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
            constant = node.body[0].value  # type: ignore[attr-defined]
            docstrings.add(id(constant))
            kind = "function" if _is_plain_function(node, name) else "docstring"
            yield Passage(name, constant.lineno, constant.value, kind)
    for node in texts:
        if id(node) not in docstrings and isinstance(node.value, str) and " " in node.value:
            yield Passage(name, node.lineno, node.value, "text")
    yield from _names_and_comments(name, text, texts)


def _names_and_comments(name: str, text: str, texts: list[ast.Constant]) -> Iterator[Passage]:
    """Yields each name once and each run of comments; much faster than tokenize."""
    lines = [line.encode() for line in text.split("\n")]
    for node in texts:
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        for number in range(first, last + 1):
            line = lines[number]
            start = node.col_offset if number == first else 0
            end = node.end_col_offset if number == last else None
            end = len(line) if end is None else end
            lines[number] = line[:start] + b" " * (end - start) + line[end:]
    names: set[str] = set()
    comments: list[str] = []
    for number, line in enumerate([*lines, b""], 1):
        code, mark, comment = line.decode(errors="replace").partition("#")
        for found in IDENTIFIER.findall(code):
            if found not in names:
                names.add(found)
                yield Passage(name, number, found, "name")
        if mark:
            comments.append(comment.strip(" #"))
        elif comments:
            yield Passage(name, number - len(comments), " ".join(comments), "comment")
            comments = []


def _is_plain_function(node: ast.AST, name: str) -> bool:
    """Returns whether the docstring must begin with a verb; those of properties need not."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or name.startswith("tests/"):
        return False
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
    plain = not any(each.endswith(("property", "command", "group")) for each in decorators)
    return plain and not node.name.startswith("__")


def _page(name: str, text: str) -> Iterator[Passage]:
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield Passage(name, number, line, "line")


def _comments(name: str, text: str, sign: str) -> Iterator[Passage]:
    """Yields each run of lines that are comments."""
    lines: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        _, found, comment = line.partition(sign)
        if found:
            lines.append(comment.strip(" #/"))
        elif lines:
            yield Passage(name, number - len(lines), " ".join(lines), "comment")
            lines = []


def files() -> Iterator[tuple[str, Path]]:
    """Yields the name and the path of every file of the repository with prose of this project."""
    for place in PLACES:
        top = ROOT / place
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            name = path.relative_to(ROOT).as_posix()
            wanted = (
                path.suffix in SUFFIXES | SLASHES
                or place in ("Makefile", "Dockerfile")
                or path == top
            )
            if path.is_file() and wanted and not LEFT_OUT.search(name) and "/." not in name:
                yield name, path


def findings(*places: str) -> list[Finding]:
    """Returns the forbidden words and forms in the files whose names begin with one of the
    places.
    """
    return [
        found
        for name, path in files()
        if not places or name.startswith(places)
        for passage in passages(path, name)
        for found in check(passage)
        if name not in ("tests/prose.py", "tests/unit/test_prose.py")
    ]


def subjects() -> list[str] | None:
    """Returns the subjects of the commits since FIRST_COMMIT; None without that history."""
    command = ["git", "-C", str(ROOT), "log", "--format=%s", f"{FIRST_COMMIT}..HEAD"]
    log = subprocess.run(command, capture_output=True, text=True, check=False)
    return log.stdout.splitlines() if log.returncode == 0 else None


def check_subject(subject: str) -> list[str]:
    """Returns the faults in the subject of a commit."""
    first = subject.split(" ")[0]
    wrong = []
    if len(subject) > SUBJECT_CHARACTERS:
        wrong.append(f"{len(subject)} characters, {SUBJECT_CHARACTERS} are allowed")
    if not first[:1].isupper() or (NO_IMPERATIVES.match(first) and first not in IMPERATIVES):
        wrong.append(f"does not begin with an imperative: {first}")
    if subject.endswith("."):
        wrong.append("ends with a period")
    wrong += [str(found) for found in check(Passage("", 0, subject, "line"))]
    return wrong


if __name__ == "__main__":
    every = findings(*sys.argv[1:])
    for each in every:
        print(each)
    print(f"{len(every)} findings")
