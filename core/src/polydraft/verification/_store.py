"""Kept verifications: one sealed JSON file each, in the user's data folder.

A file counts if its seal fits (``polydraft._sealed`` says what that finds), its name is that of its subject, and each
verdict follows from its evidence.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from polydraft._folders import data_folder
from polydraft._sealed import read_sealed, write_sealed
from polydraft.verification._records import FORMAT, Subject, Verification

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Found", "find", "folder", "save"]

_LOADED_ONLY = {"dtype", "device", "target_fingerprint", "drafter_fingerprint"}
"""Fields of a subject that may be known only after loading: empty until then."""


@dataclass(frozen=True, slots=True)
class Found:
    """The stored verification of a subject, or why none applies."""

    verification: Verification | None
    why_not: str = ""
    """Why there is no verification, one sentence."""


def folder() -> Path:
    """Where verifications are kept."""
    return data_folder() / "verified"


def save(verification: Verification) -> Path:
    """Keep a verification; an older one of the same subject is replaced.

    Raises:
        OSError: The folder cannot be written.
    """
    path = folder() / _file_name(verification.subject)
    write_sealed(path, verification.model_dump(mode="json"))
    return path


def _file_name(subject: Subject) -> str:
    """Named by the subject alone, without names of models: a newer verification of the same replaces the file."""
    same = subject.model_dump_json(exclude={"target", "drafter"})
    return f"{hashlib.sha256(same.encode()).hexdigest()[:32]}.json"


def find(subject: Subject, *, loaded: bool = False) -> Found:
    """The newest verification of exactly this subject.

    Args:
        subject: Empty fields that are known only after loading match any, and the newest verification that passes is
            preferred: which one counts is not known yet. A model whose bytes are not known is compared by its name and
            its commit, if that is known.
        loaded: Whether it is loaded: then nothing of it may be unknown.
    """
    if subject.builds is None or (loaded and subject.unknown):
        return Found(None, subject.unknown)
    ignored = {name for name in _LOADED_ONLY if getattr(subject, name) == ""}
    wanted = subject.model_dump(exclude=ignored | _names(subject))
    fitting: list[Verification] = []
    others: list[tuple[list[str], Verification]] = []
    for kept in _all():
        same_bytes = subject.target_fingerprint and kept.subject.target_fingerprint == subject.target_fingerprint
        if kept.subject.backend != subject.backend or not (same_bytes or kept.subject.target == subject.target):
            continue
        found = kept.subject.model_dump()
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


def _names(subject: Subject) -> set[str]:
    """The fields that only name a model: not compared where its bytes are known."""
    roles = [role for role in ("target", "drafter") if getattr(subject, f"{role}_fingerprint")]
    commits = {f"{role}_commit" for role in ("target", "drafter") if not getattr(subject, f"{role}_commit")}
    return {name for role in roles for name in (role, f"{role}_commit")} | commits


def _all() -> Iterator[Verification]:
    """Every kept verification that counts; others are of another version of polydraft, damaged, or edited."""
    for path in sorted(folder().glob("*.json")):
        try:
            kept = Verification.model_validate(read_sealed(path))
        except ValidationError:
            continue
        if kept.format == FORMAT and path.name == _file_name(kept.subject) and kept.sound:
            yield kept


def _change(name: str, before: Subject, now: Subject) -> str:
    """One difference in words."""
    if name.endswith("_fingerprint"):
        role = name.removesuffix("_fingerprint")
        old, new = getattr(before, role), getattr(now, role)
        return f"the {role}'s files have changed" if old == new else f"{role} was {old}, is {new}"
    if name in {"versions", "builds"}:
        was, is_now = getattr(before, name) or {}, getattr(now, name) or {}
        changed = [key for key in sorted(was.keys() | is_now.keys()) if was.get(key) != is_now.get(key)]
        if name == "builds":
            return f"another build of {', '.join(changed)}"
        return ", ".join(f"{key} was {was.get(key)}, is {is_now.get(key)}" for key in changed)
    words = {
        "target_commit": "the target's commit",
        "drafter_commit": "the drafter's commit",
        "num_speculative_tokens": "k",
        "max_speculative_tokens": "the largest k",
        "method": "the drafter kind",
        "engine_options": "the engine's options",
    }
    return f"{words.get(name, name)} was {getattr(before, name)}, is {getattr(now, name)}"
