"""Does a plugin import only what is public? Read from its source; none of it is run.

A module is public if no part of its path starts with an underscore, and it is in ``PUBLIC_MODULES`` or a chapter of
``polydraft.contract``; of a public module the names in its ``__all__`` are public. Imports are checked, and attributes
looked up on imported modules of polydraft; names built at run time are not.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from polydraft import contract
from polydraft.contract import PUBLIC_MODULES

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["private_imports", "source_of"]

_ROOTS = ("polydraft", "polydraft_conformance")
_CONTRACT = "polydraft.contract"
_CHAPTERS = {f"{_CONTRACT}.{module.name}" for module in iter_modules(contract.__path__)}
_DOORS = {name for name in {*PUBLIC_MODULES, *_CHAPTERS} if not any(part.startswith("_") for part in name.split("."))}


def source_of(name: str) -> Path:
    """The folder (or file) of a package's source, by import name or path, without importing the package.

    Raises:
        LookupError: There is no such package, or it has no source.
    """
    path = Path(name)
    if path.exists():
        return path
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise LookupError(f"There is no package or folder {name!r}.")
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def private_imports(source: Path) -> list[str]:
    """The private parts of polydraft that a plugin uses, one sentence each, with file and line.

    Args:
        source: A folder of Python files, or one file.

    Raises:
        SyntaxError: A file cannot be parsed.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.py"))
    found = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
        found += [f"{file}:{line}: {what}" for line, what in _problems(tree)]
    return found


def _problems(tree: ast.Module) -> Iterator[tuple[int, str]]:
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if not _ours(name.name):
                    continue
                aliases[name.asname or name.name.partition(".")[0]] = (
                    name.name if name.asname else name.name.partition(".")[0]
                )
                if name.name not in _DOORS:
                    yield node.lineno, f"the module {name.name} is private."
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _ours(module := node.module or ""):
            for name in node.names:
                if problem := _name_problem(module, name.name):
                    yield node.lineno, problem
                elif f"{module}.{name.name}" in _DOORS:
                    aliases[name.asname or name.name] = f"{module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = _module(node.value, aliases)
            if owner in _DOORS and (problem := _name_problem(owner, node.attr)):
                yield node.lineno, problem


def _name_problem(module: str, name: str) -> str:
    """Why a name of a module is not public; empty if it is, or if it leads to a public module."""
    full = f"{module}.{name}"
    if any(public == full or public.startswith(f"{full}.") for public in _DOORS):
        return ""
    if module not in _DOORS:
        return f"the module {module} is private."
    public = getattr(import_module(module), "__all__", ())
    return "" if name in public else f"{full} is private."


def _module(node: ast.expr, aliases: dict[str, str]) -> str:
    """The module that an expression such as ``polydraft.errors`` names; empty if it names none."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute) and (owner := _module(node.value, aliases)):
        return f"{owner}.{node.attr}"
    return ""


def _ours(module: str) -> bool:
    return module.partition(".")[0] in _ROOTS
