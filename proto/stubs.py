"""Generates and compiles the stubs of other languages: `make stubs`.

python proto/stubs.py [--output FOLDER] [--installed] [LANGUAGE...]

Each language has a template for buf in proto/stubs. A language is skipped, with the reason, if a
program that it needs is neither on PATH nor in node_modules nor in Debian's packages, which are
unpacked into .tools/debian; `--installed` uses only those that are there. The example of a language
is compiled with its stubs, and `run` in the folder of the language starts it. The exit code is 1 if
something does not compile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import debian

ROOT = Path(__file__).resolve().parents[1]
NODE_PROGRAMS = ROOT / "node_modules" / ".bin"


@dataclass(frozen=True)
class Language:
    """How to build the stubs of a language.

    Attributes:
        programs: the programs that are needed.
        commands: returns the commands that compile the stubs in a folder, none if it cannot.
        example: returns the command that runs the example, which is compiled with the stubs.
        whole: whether Google's protos are generated too, though the template leaves them out.
    """

    programs: tuple[str, ...]
    commands: Callable[[Path], list[list[str]]] | None = None
    example: Callable[[Path], list[str]] | None = None
    whole: bool = False


def typescript(folder: Path) -> list[list[str]]:
    shutil.copy(ROOT / "examples" / "typescript" / f"{_library(folder)}.ts", folder)
    shutil.copy(ROOT / "examples" / "typescript" / "tsconfig.json", folder)
    (folder / "package.json").write_text('{"type": "module"}\n')
    (folder / "node_modules").symlink_to(ROOT / "node_modules")
    return [["tsc", "--project", str(folder)]]


def run_typescript(folder: Path) -> list[str]:
    return ["node", str(folder / f"{_library(folder)}.js")]


def _library(folder: Path) -> str:
    return folder.name.removeprefix("typescript-")


def java(folder: Path) -> list[list[str]]:
    shutil.copy(ROOT / "examples" / "java" / "Generate.java", folder)
    sources = sorted(str(path) for path in folder.rglob("*.java"))
    # A compiler that runs once is faster without its optimizing compiler and parallel collector.
    options = ["-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC", "-nowarn", "-proc:none"]
    options += ["-classpath", classpath(), "-d", str(folder / "classes")]
    return [["javac", *options, *sources]]


def run_java(folder: Path) -> list[str]:
    return ["java", "-classpath", f"{folder / 'classes'}:{classpath()}", "Generate"]


def classpath() -> str:
    """Returns the libraries of Debian that stubs for Java need."""
    folders = [debian.ROOT / "usr" / "share" / "java", Path("/usr/share/java")]
    found = {}
    for folder in reversed(folders):
        for prefix in ("grpc-", "netty-", "protobuf", "perfmark-", "opencensus-", "gson"):
            found |= {path.name: path for path in folder.glob(f"{prefix}*.jar")}
        for name in ("guava", "failureaccess", "jsr305", "geronimo-annotation-1.3-spec"):
            found |= {path.name: path for path in folder.glob(f"{name}.jar")}
    return ":".join(str(path) for path in found.values())


def cpp(folder: Path) -> list[list[str]]:
    options = ["-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{debian.ROOT}/usr/include"]
    sources = sorted(folder.rglob("*.cc"))
    # Files with messages only have empty files of services.
    wanted = [path for path in sources if "Stub" in path.read_text() or ".grpc." not in path.name]
    return [["g++", *options, str(path)] for path in wanted]


def ruby(folder: Path) -> list[list[str]]:
    files = sorted(path.relative_to(folder) for path in folder.rglob("*_pb.rb"))
    requires = [option for path in files for option in ("-r", str(path.with_suffix("")))]
    return [["ruby", "-I", str(folder), *requires, "-e", "Img2Img::V1::Img2ImgService::Stub"]]


def go(folder: Path) -> list[list[str]]:
    if not any((path / "src/google.golang.org/grpc").exists() for path in _gocode()):
        return []  # Newer versions of Go load modules, which a module of the caller declares.
    (folder / "gopath").mkdir()
    (folder / "gopath" / "src").symlink_to(folder)
    path = ":".join(map(str, [folder / "gopath", *_gocode()]))
    variables = {"GO111MODULE": "off", "GOPATH": path, "GOCACHE": str(debian.ROOT / "gocache")}
    settings = [f"{name}={value}" for name, value in variables.items()]
    return [["env", *settings, "go", "build", "img2img/v1"]]


def _gocode() -> list[Path]:
    """Returns the folders of Debian's packages of Go."""
    return [debian.ROOT / "usr/share/gocode", Path("/usr/share/gocode")]


NODE = ("buf", "node", "tsc")
LANGUAGES = {
    "typescript-connect": Language((*NODE, "protoc-gen-es"), typescript, run_typescript),
    "typescript-grpc-js": Language((*NODE, "protoc-gen-ts_proto"), typescript, run_typescript),
    "java": Language(
        ("buf", "protoc", "grpc_java_plugin", "javac", "java"), java, run_java, whole=True
    ),
    "kotlin": Language(("buf", "protoc", "protoc-gen-grpc-kotlin")),
    "go": Language(("buf", "protoc-gen-go", "protoc-gen-go-grpc", "go"), go),
    "csharp": Language(("buf", "protoc", "grpc_csharp_plugin")),
    "rust": Language(("buf", "protoc-gen-prost", "protoc-gen-tonic")),
    "ruby": Language(("buf", "protoc", "grpc_ruby_plugin", "ruby"), ruby),
    "cpp": Language(("buf", "protoc", "grpc_cpp_plugin", "g++"), cpp),
}


def main() -> int:
    """Returns 1 if the stubs of a language do not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / ".tools" / "stubs")
    parser.add_argument("--installed", action="store_true", help="download no packages")
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE")
    arguments = parser.parse_args()
    if unknown := set(arguments.languages) - LANGUAGES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(LANGUAGES)}")
    failed = False
    for name in arguments.languages or LANGUAGES:
        if not arguments.installed and name in debian.PACKAGES:
            try:
                debian.fetch(name)
            except debian.FetchError as error:
                print(f"{name}: no packages of Debian: {error}", file=sys.stderr)
        began = time.monotonic()
        missing = [each for each in LANGUAGES[name].programs if which(each) is None]
        if missing:
            print(f"{name}: skipped: {' and '.join(missing)} not installed", flush=True)
            continue
        try:
            compiled = build(name, arguments.output.resolve() / name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: failed: {error}\n{error.stdout}", file=sys.stderr, flush=True)
            failed = True
            continue
        done = "generated and compiled" if compiled else "generated"
        print(f"{name}: {done} in {time.monotonic() - began:.1f} s", flush=True)
    return int(failed)


def build(name: str, folder: Path) -> bool:
    """Generates the stubs of a language and compiles them. Returns whether it could compile them.

    Raises:
        CalledProcessError: a program failed; the error has its output.
    """
    language = LANGUAGES[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    template = f"proto/stubs/buf.gen.{name}.yaml"
    inputs = ["proto"] if language.whole else []
    run("buf", "generate", *inputs, "--template", template, "--output", str(folder))
    commands = language.commands(folder) if language.commands else []
    for command in commands:
        run(*command)
    if language.example:
        script = folder / "run"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(language.example(folder))} "$@"\n')
        script.chmod(0o755)
    return bool(commands)


def run(*command: str) -> None:
    program = which(command[0])
    assert program is not None
    subprocess.run(  # noqa: S603
        [program, *command[1:]],
        cwd=ROOT,
        env=environment(),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def which(program: str) -> str | None:
    return shutil.which(program, path=environment()["PATH"])


def environment() -> dict[str, str]:
    """Returns the environment of generators and compilers."""
    found = {**os.environ, **debian.environment()}
    found["PATH"] = f"{NODE_PROGRAMS}:{found['PATH']}"
    return {**found, "RUBYLIB": ":".join(_ruby("lib/ruby")), "GEM_PATH": ":".join(_gems())}


def _ruby(place: str) -> Iterator[str]:
    """Yields the folders of Ruby's library."""
    for base in (debian.ROOT / "usr/lib/ruby", *debian.ROOT.glob("usr/lib/*-linux-gnu/ruby")):
        yield from map(str, [*base.glob("[0-9]*"), base / "vendor_ruby"])


def _gems() -> Iterator[str]:
    """Yields the folders of Debian's gems."""
    for base in ("usr/share", "usr/lib/*-linux-gnu"):
        yield from map(str, debian.ROOT.glob(f"{base}/rubygems-integration/*"))


if __name__ == "__main__":
    sys.exit(main())
