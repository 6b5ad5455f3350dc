"""The corpus: the files of the standard library for training, and those held out for scoring."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = (
    "asyncio/locks.py", "bisect.py", "colorsys.py", "configparser.py", "csv.py", "fractions.py", "graphlib.py",
    "heapq.py", "html/parser.py", "http/cookies.py", "json/encoder.py", "logging/config.py", "queue.py", "shelve.py",
    "statistics.py", "string.py", "test/test_bisect.py", "test/test_queue.py", "textwrap.py", "unittest/case.py",
    "urllib/robotparser.py", "wsgiref/headers.py",
)  # fmt: skip
"""Modules that are not used for training."""

SKIPPED_FOLDERS = ("site-packages", "encodings", "pydoc_data", "idlelib", "turtledemo", "bad_coding", "__pycache__")
MAX_FILE_BYTES = 250_000


@dataclass(frozen=True)
class Source:
    """One file of the standard library."""

    name: str
    text: str


@dataclass(frozen=True)
class Described:
    """A function or class with a docstring, for the chat documents."""

    module: str
    name: str
    signature: str
    parameters: tuple[str, ...]
    summary: str
    code: str


def read_sources() -> tuple[list[Source], list[Source]]:
    """Training files and held-out files, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[Source] = []
    held: list[Source] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in path.parts):
            continue
        if path.stat().st_size > MAX_FILE_BYTES or path.stat().st_size < 200:
            continue
        try:
            source = Source(name, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        (held if name in HELD_OUT else train).append(source)
    missing = set(HELD_OUT) - {source.name for source in held}
    if missing:
        raise RuntimeError(f"held-out modules not found: {sorted(missing)}")
    return train, held


def module_name(path: str) -> str:
    """The dotted name: `json/encoder.py` is `json.encoder`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def first_paragraph(docstring: str) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


def described(source: Source) -> Iterator[Described]:
    """Every function and class of a module that has a docstring."""
    try:
        tree = ast.parse(source.text)
    except (SyntaxError, ValueError):
        return
    lines = source.text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or not 12 <= len(first_paragraph(docstring)) <= 400:
            continue
        parameters: tuple[str, ...] = ()
        if not isinstance(node, ast.ClassDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            parameters = tuple(name for name in names if name not in ("self", "cls"))
        code = "".join(lines[node.lineno - 1 : node.end_lineno])
        yield Described(
            module=module_name(source.name),
            name=node.name,
            signature=f"{node.name}({', '.join(parameters)})",
            parameters=parameters,
            summary=first_paragraph(docstring),
            code=code,
        )
