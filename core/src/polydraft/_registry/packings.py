"""The registry of packings: in which formats and quantizations a target's weights are published.

Entries come from the user's own files of pairs, then from the core's list; of two of equal quantization the first is
taken. A user's entry looks like this::

    [[packing]]
    target = "my-org/big"
    repo = "my-org/big-GGUF"
    format = "gguf"
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from polydraft._registry.pairs import user_files
from polydraft._registry.tables import core_table, expand, read_packings
from polydraft.contract.packings import PackingRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["PackingRegistry"]


class PackingRegistry:
    """All known packings, of concrete ids, in the order of the files."""

    def __init__(self, entries: Iterable[PackingRecord]) -> None:
        self.entries = tuple(entries)

    @classmethod
    def load(cls, *, environ: Mapping[str, str] | None = None) -> PackingRegistry:
        """The user's packings and the core's.

        Raises:
            InvalidRequestError: The user's file is broken; the sentence names file, line and field.
        """
        own = [one for path in user_files(environ) for record in read_packings(path) for one in _expanded(record)]
        return cls([*own, *_core_packings()])

    def find(self, target: str) -> list[PackingRecord]:
        """The packings of a target's Hub id; letter case does not matter. Other copies of a model have none."""
        return [entry for entry in self.entries if entry.target.lower() == target.lower()]

    def base_of(self, repo: str) -> str | None:
        """The target of which a repository holds a packing; None if it is not known as one."""
        return next((entry.target for entry in self.entries if entry.repo.lower() == repo.lower()), None)

    def quantization_of(self, repo: str) -> str:
        """The quantization of all that a repository holds, as the registry says; empty if it does not."""
        return next((entry.quantization for entry in self.entries if entry.repo.lower() == repo.lower()), "")

    def formats(self) -> dict[str, str]:
        """Hub id -> weight format, of every repository."""
        return {entry.repo: entry.format for entry in self.entries}


def _expanded(record: PackingRecord) -> list[PackingRecord]:
    return [
        record.model_copy(update={"target": target, "repo": repo, "quantization": quantization, "file": file})
        for target, repo, quantization, file in expand(record.target, record.repo, record.quantization, record.file)
    ]


@cache
def _core_packings() -> tuple[PackingRecord, ...]:
    return tuple(one for table in core_table("packing") for one in _expanded(PackingRecord.model_validate(table)))
