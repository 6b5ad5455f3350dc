"""Kept tunings: one sealed JSON file each, in the user's data folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from polydraft._folders import data_folder
from polydraft._sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from polydraft._tune._records import TuningResult

__all__ = ["folder", "forget", "kept", "save"]


def folder() -> Path:
    """Where tunings are kept."""
    return data_folder() / "tuned"


def save(result: TuningResult) -> Path:
    """Keep a tuning; an older one of the same target, arguments and processor is replaced.

    Raises:
        OSError: The folder cannot be written.
    """
    path = folder() / _file_name(result)
    write_sealed(path, result.model_dump(mode="json"))
    return path


def kept() -> list[TuningResult]:
    """Every kept tuning that counts, the newest first; others are of another version, damaged, or edited."""
    # ISO 8601 in UTC sorts as text.
    return sorted((result for _, result in _read()), key=lambda result: result.created, reverse=True)


def _read() -> Iterator[tuple[Path, TuningResult]]:
    from polydraft._tune._records import FORMAT, TuningResult  # pydantic and more: only where something is kept

    for path in folder().glob("*.json"):
        try:
            result = TuningResult.model_validate(read_sealed(path))
        except ValidationError:
            continue
        if result.format == FORMAT and path.name == _file_name(result):
            yield path, result


def forget(target: str | None = None) -> int:
    """Remove the tunings of a target, or all; how many there were."""
    if target is None:
        paths = list(folder().glob("*.json"))  # those that do not count, too
    else:
        paths = [path for path, result in _read() if result.target == target]
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def _file_name(result: TuningResult) -> str:
    same = result.model_dump_json(include={"target", "revision", "asked", "processor"})
    return f"{hashlib.sha256(same.encode()).hexdigest()[:32]}.json"
