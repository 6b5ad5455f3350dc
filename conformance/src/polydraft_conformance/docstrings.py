"""The docstring of a check, taken apart: pages, the report and ``explain`` show its sections."""

from __future__ import annotations

import re
from typing import TypedDict

__all__ = ["Sections", "read_sections"]

_TITLE = re.compile(r"^\s*(Proves:|A failure means:|Look at:)", re.MULTILINE)


class Sections(TypedDict):
    """Each one paragraph, without line breaks; empty where the docstring has no such section."""

    statement: str
    proves: str
    failure: str
    look: str


def read_sections(docstring: str) -> Sections:
    """Take a check's docstring apart.

    It has the form::

        What holds if it passes, one sentence.

        Proves: ...
        A failure means: ...
        Look at: ...
    """
    statement, *rest = _TITLE.split(docstring)
    # ``rest`` is title, text, title, text, ...
    found = {title: " ".join(text.split()) for title, text in zip(rest[::2], rest[1::2], strict=True)}
    return Sections(
        statement=statement.strip().split("\n")[0],
        proves=found.get("Proves:", ""),
        failure=found.get("A failure means:", ""),
        look=found.get("Look at:", ""),
    )
