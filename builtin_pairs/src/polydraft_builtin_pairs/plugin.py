"""The plugin's entry point: makes the pairs known as ``builtin:<name>``. Nothing else here needs polydraft."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polydraft.contract import LocalModelRecord, PairRecord, hookimpl

from ._data import names, pairs, path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from polydraft.contract import DrafterKind

_K = 4
"""The k that the pairs were scored with; see the model card."""


@hookimpl
def polydraft_local_models() -> Iterable[LocalModelRecord]:
    """All targets and drafters."""
    for name in names():
        yield LocalModelRecord(name=name, path=str(path(name)), format="safetensors")


@hookimpl
def polydraft_pairs() -> Iterable[PairRecord]:
    """Each target with its own drafter: a plain model's is a plain model, the others' are assistants."""
    for target, drafter in pairs().items():
        kind: DrafterKind = "draft-model" if target == "tiny-llama" else "mtp"
        yield PairRecord(
            target=f"builtin:{target}",
            drafter=f"builtin:{drafter}",
            kind=kind,
            num_speculative_tokens={"*": _K},
            k_source="the model card of polydraft-builtin-pairs",
        )
