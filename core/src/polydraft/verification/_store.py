"""Kept verifications: one JSON file each, in the user's data folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from polydraft.files import read_bytes, system_errors
from polydraft.verification._records import FORMAT, Subject, Verification

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Found", "find", "folder", "save"]

_LOADED_ONLY = {"dtype", "device"}
"""Fields of a subject that are known only after loading."""


@dataclass(frozen=True, slots=True)
class Found:
    """The stored verification of a subject, or why none applies."""

    verification: Verification | None
    why_not: str = ""
    """Why there is no verification, one sentence."""


def folder() -> Path:
    """Where verifications are kept."""
    from platformdirs import user_data_path

    return user_data_path("polydraft") / "verified"


def save(verification: Verification) -> Path:
    """Keep a verification; an older one of the same subject is replaced.

    Raises:
        OSError: The folder cannot be written.
    """
    subject = verification.subject.model_dump_json()
    # Named by the subject alone: a newer verification of it replaces this file.
    path = folder() / f"{hashlib.sha256(subject.encode()).hexdigest()[:32]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may save at once: a reader must never see half a file.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(verification.model_dump_json(indent=1))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def find(subject: Subject) -> Found:
    """The newest verification of exactly this subject.

    Args:
        subject: Empty ``dtype`` and ``device`` match any, and the newest verification that passes is preferred: which
            one counts is known only after loading.
    """
    ignored = {name for name in _LOADED_ONLY if not getattr(subject, name)}
    wanted = subject.model_dump(exclude=ignored)
    fitting: list[Verification] = []
    others: list[tuple[list[str], Verification]] = []
    for kept in _all():
        if kept.subject.backend != subject.backend or kept.subject.target != subject.target:
            continue
        found = kept.subject.model_dump(exclude=ignored)
        different = [name for name in wanted if found[name] != wanted[name]]
        if different:
            others.append((different, kept))
        else:
            fitting.append(kept)
    if fitting:
        # ISO 8601 in UTC sorts as text. With dtype and device known the newest counts, even if it failed.
        return Found(max(fitting, key=lambda kept: (kept.passes or not ignored, kept.created)))
    if not others:
        return Found(None, f"{subject.target} has not been verified here with {subject.backend}.")
    # The one with the fewest differences explains best.
    different, kept = min(others, key=lambda entry: len(entry[0]))
    return Found(
        None,
        f"{subject.target} was verified here with {subject.backend}, but not as it would run now: "
        + "; ".join(_change(name, kept.subject, subject) for name in different)
        + ".",
    )


def _all() -> Iterator[Verification]:
    """Every kept verification that can be read."""
    for path in sorted(folder().glob("*.json")):
        try:
            # A system that cannot read any file must not look like a pair that has never been verified.
            with system_errors(f"The kept verification {path} cannot be read"):
                kept = Verification.model_validate_json(read_bytes(path))
        except (OSError, ValueError, ValidationError):
            continue  # written by another version of polydraft, or damaged
        if kept.format == FORMAT and kept.cases:
            yield kept


def _change(name: str, before: Subject, now: Subject) -> str:
    """One difference in words."""
    if name.endswith("_fingerprint"):
        return f"the {name.removesuffix('_fingerprint')}'s files have changed"
    if name == "versions":
        both = sorted(before.versions.keys() | now.versions.keys())
        changes = [(key, before.versions.get(key), now.versions.get(key)) for key in both]
        return ", ".join(f"{key} was {old}, is {new}" for key, old, new in changes if old != new)
    words = {"num_speculative_tokens": "k", "method": "the drafter kind", "engine_options": "the engine's options"}
    return f"{words.get(name, name)} was {getattr(before, name)}, is {getattr(now, name)}"
