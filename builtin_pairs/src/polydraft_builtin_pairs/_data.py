"""Where the model folders are, which belong together, and whether they are intact."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"
CHECKSUMS = ROOT / "SHA256SUMS"

_PAIRS: Mapping[str, str] = MappingProxyType(
    {
        "tiny-e2b": "tiny-e2b-assistant",
        "tiny-31b": "tiny-31b-assistant",
        "tiny-26b": "tiny-26b-assistant",
        "tiny-llama": "tiny-llama-draft",
    }
)
_NAMES = tuple(name for pair in _PAIRS.items() for name in pair)


class UnknownNameError(KeyError):
    """No built-in model has this name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    def __str__(self) -> str:
        return f"no built-in model is named {self.name!r}; there are: {', '.join(_NAMES)}"


class DataError(RuntimeError):
    """A file of the package's data is missing or differs from what was shipped."""


def names() -> tuple[str, ...]:
    """The names of all models, targets and drafters: each is a folder.

    >>> names()[:2]
    ('tiny-e2b', 'tiny-e2b-assistant')
    """
    return _NAMES


def pairs() -> Mapping[str, str]:
    """Each target's name and its drafter's.

    >>> pairs()["tiny-llama"]
    'tiny-llama-draft'
    """
    return _PAIRS


def path(name: str) -> Path:
    """The folder of a model, in the layout that Transformers saves.

    Raises `UnknownNameError`, a `KeyError`, for any other name.

    >>> path("tiny-31b").name
    'tiny-31b'
    """
    if name not in _NAMES:
        raise UnknownNameError(name)
    return DATA / name


def checksums() -> dict[str, str]:
    """The SHA-256 of every shipped file, by its path below the package."""
    sums: dict[str, str] = {}
    for line in CHECKSUMS.read_text(encoding="utf-8").splitlines():
        digest, _, file = line.partition("  ")
        sums[file] = digest
    return sums


def verify() -> None:
    """Reads every shipped file; raises `DataError`, naming those missing, changed or not listed.

    >>> verify()
    """
    expected = checksums()
    faults: list[str] = []
    for file, digest in expected.items():
        location = ROOT / file
        if not location.is_file():
            faults.append(f"{file}: missing")
        elif hashlib.sha256(location.read_bytes()).hexdigest() != digest:
            faults.append(f"{file}: changed")
    present = {found.relative_to(ROOT).as_posix() for found in DATA.rglob("*") if found.is_file()}
    faults += [f"{file}: not listed" for file in sorted(present - expected.keys())]
    if faults:
        raise DataError("the built-in models are not as shipped: " + "; ".join(faults))
