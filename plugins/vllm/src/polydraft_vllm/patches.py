"""Replacing functions of vLLM, with the originals kept."""

from __future__ import annotations

from typing import Any

__all__ = ["replace", "upstream"]

_originals: dict[tuple[str, str], Any] = {}


def replace(owner: Any, name: str, replacement: Any) -> None:
    """Put ``replacement`` in place of a function; does nothing if that was done before.

    Args:
        owner: The module or class.
        name: Of the function.
        replacement: What takes its place.
    """
    key = (owner.__name__, name)
    if key not in _originals:
        _originals[key] = getattr(owner, name)
        setattr(owner, name, replacement)


def upstream(owner: str, name: str) -> Any:
    """vLLM's own version of a function that ``replace`` has replaced.

    Args:
        owner: Name of the module or class.
        name: Of the function.
    """
    return _originals[owner, name]
