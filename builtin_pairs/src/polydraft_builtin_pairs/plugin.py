"""The plugin: registers the models as ``builtin:<name>``. Only this module needs polydraft."""

from __future__ import annotations

from collections.abc import Iterable

from polydraft.contract import DrafterKind, LocalModelRecord, PairRecord, hookimpl

from ._data import names, pairs, path

_K = 4
"""The k of the scores in the model card."""


@hookimpl
def polydraft_local_models() -> Iterable[LocalModelRecord]:
    """All targets and drafters."""
    for name in names():
        yield LocalModelRecord(name=name, path=str(path(name)), format="safetensors")


@hookimpl
def polydraft_pairs() -> Iterable[PairRecord]:
    """Each target with its drafter: a draft model for the Llama target, assistants for the others."""
    for target, drafter in pairs().items():
        kind: DrafterKind = "draft-model" if target == "tiny-llama" else "mtp"
        yield PairRecord(
            target=f"builtin:{target}",
            drafter=f"builtin:{drafter}",
            kind=kind,
            num_speculative_tokens={"*": _K},
            k_source="the model card of polydraft-builtin-pairs",
        )
