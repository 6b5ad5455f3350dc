"""The model folders: their paths, which belong together, and whether they are intact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

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
    """A data file of the package is missing, changed or not listed."""


def names() -> tuple[str, ...]:
    """The names of all targets and drafters; each has a folder.

    >>> names()[:2]
    ('tiny-e2b', 'tiny-e2b-assistant')
    """
    return _NAMES


def pairs() -> Mapping[str, str]:
    """Target's name -> its drafter's name.

    >>> pairs()["tiny-llama"]
    'tiny-llama-draft'
    """
    return _PAIRS


def path(name: str) -> Path:
    """The folder of a model, in the layout of Transformers' ``save_pretrained``.

    >>> path("tiny-31b").name
    'tiny-31b'

    Raises:
        UnknownNameError: No model has this name. It is a ``KeyError``.
    """
    if name not in _NAMES:
        raise UnknownNameError(name)
    return DATA / name


def verify() -> None:
    """Check every data file against its SHA-256.

    >>> verify()

    Raises:
        DataError: Files are missing, changed or not listed; the error names them.
    """
    lines = (line.partition("  ") for line in CHECKSUMS.read_text(encoding="utf-8").splitlines())
    expected = {file: digest for digest, _, file in lines}
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
