"""The tests that ``nox -s tests`` leaves out for time: marked ``@pytest.mark.slow("why")``, or in a module that is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["SlowTest", "tests"]


class SlowTest(NamedTuple):
    """A test, or a module of tests, and why it is left out."""

    name: str
    reason: str


def tests(root: Path) -> list[SlowTest]:
    """All of a repository, found in the source: nothing is imported.

    Raises:
        ValueError: A marker gives no reason.
    """
    files = sorted(path for pattern in ("*/tests", "plugins/*/tests") for path in root.glob(f"{pattern}/**/test_*.py"))
    return [test for file in files for test in _of(file, file.relative_to(root).as_posix())]


def _of(file: Path, name: str) -> Iterator[SlowTest]:
    source = file.read_text(encoding="utf-8")
    if "mark.slow" not in source:
        return
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for mark in node.decorator_list:
                yield from _marked(mark, f"{name}::{node.name}")
        elif isinstance(node, ast.Assign) and any(
            isinstance(to, ast.Name) and to.id == "pytestmark" for to in node.targets
        ):
            yield from _marked(node.value, name)


def _marked(mark: ast.expr, name: str) -> Iterator[SlowTest]:
    """Yields the test if its marker is, or its markers contain, the one for slow tests."""
    for node in ast.walk(mark):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.slow":
            calls = (call for call in ast.walk(mark) if isinstance(call, ast.Call) and call.func is node)
            reasons = [ast.literal_eval(argument) for call in calls for argument in call.args]
            if len(reasons) != 1 or not reasons[0]:
                raise ValueError(f'{name} is slow without a reason: write @pytest.mark.slow("why it takes long")')
            yield SlowTest(name, reasons[0])
