"""An extension of griffe for the documentation site: examples in docstrings, as doctest reads them, become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.MULTILINE)


class Doctests(griffe.Extension):  # type: ignore[misc]  # not in the environment of the types check
    """Puts fences around examples."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with each object that was read."""
        fence(obj)

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        """Called with each module."""
        fence(mod)


def fence(read: griffe.Object) -> None:
    """Put fences around the examples of a docstring."""
    if read.docstring is not None and "```pycon" not in read.docstring.value:
        read.docstring.value = _EXAMPLE.sub(fenced, read.docstring.value)


def fenced(found: re.Match[str]) -> str:
    """An example as a block of code."""
    return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"
