"""Replacing functions of vLLM, with the originals kept."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

__all__ = ["replace", "upstream"]

_originals: dict[str, Any] = {}


def replace(path: str, replacement: Any) -> None:
    """Put ``replacement`` in place of the function at ``path`` (``module.name`` or ``module.Class.name``).

    None: the function itself, without ``torch.compile``. Does nothing if that was done before.
    """
    if path not in _originals:
        owner, _, name = path.rpartition(".")
        original = _originals[path] = getattr(resolve_name(owner), name)
        setattr(resolve_name(owner), name, replacement or getattr(original, "_torchdynamo_orig_callable", original))


def upstream(path: str) -> Any:
    """vLLM's own version of a function that ``replace`` has replaced."""
    return _originals[path]
