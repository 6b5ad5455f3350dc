"""Numbers as callers have them (Python's own, and those of numpy, torch, ``decimal`` and ``fractions``), and sizes."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["MOST_SECONDS", "as_bool", "as_float", "as_int", "as_seconds", "as_size", "shown"]

MOST_SECONDS = 1e8
"""The longest time that is accepted, about three years: clocks and locks refuse far longer ones."""

_LONGEST_SHOWN = 150


def as_int(value: Any) -> int | None:
    """A whole number: an int, or a scalar that can be an index. None for others, bools among them: 5.0 is none."""
    if _is_bool(value) or _has_dimensions(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor's own errors are of several kinds
        return None


def as_float(value: Any) -> float | None:
    """A number of any kind as a float; None for others, bools among them, and for those too large for a float."""
    if _is_bool(value) or isinstance(value, str) or _has_dimensions(value) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def as_seconds(value: Any) -> float | None:
    """A positive time of at most ``MOST_SECONDS``; None for anything else."""
    seconds = as_float(value)
    return seconds if seconds and 0 < seconds <= MOST_SECONDS else None  # NaN is not above 0


def as_bool(value: Any) -> bool | None:
    """True or False, Python's or numpy's; None for others."""
    return bool(value) if _is_bool(value) and not _has_dimensions(value) else None


def _has_dimensions(value: Any) -> bool:
    return bool(getattr(value, "ndim", False))  # an array, even of one element


def _is_bool(value: Any) -> bool:
    # Arrays' and tensors' scalars by their dtype: torch.bool, numpy's bool.
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).rpartition(".")[2] == "bool"


def shown(value: Any) -> str:
    """``repr`` of what a caller gave, cut where it is long; of what has none (a number of 5,000 digits) its type."""
    try:
        text = repr(value)
    except Exception:  # of any kind: the caller's own object may raise
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def as_size(count: int) -> str:
    """Bytes in the largest unit of 1024 that leaves a number of at least 1.

    >>> as_size(3 * 2**30), as_size(1536), as_size(12)
    ('3.0 GiB', '1.5 KiB', '12 bytes')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} bytes"
