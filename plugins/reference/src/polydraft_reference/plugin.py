"""The entry point: cheap records. polydraft imports this module for every user, so numpy is not imported here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polydraft.contract import BackendRecord, DrafterKind, LocalModelRecord, PairRecord, hookimpl

__all__ = ["polydraft_backends", "polydraft_local_models", "polydraft_pairs"]

_MODELS = Path(__file__).with_name("models")


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """The backend ``reference``."""
    yield BackendRecord(
        name="reference",
        factory="polydraft_reference.backend:ReferenceBackend",
        summary="A tiny pure-numpy engine for tests and plugin authors; runs toy models only",
        formats=frozenset({"reference"}),
        drafter_kinds=frozenset({"mtp", "draft-model", "ngram"}),
        engine="polydraft-reference",
        requires={"numpy": ">=2.0"},
        install_hint="pip install polydraft-reference",
    )


@hookimpl
def polydraft_local_models() -> Iterable[LocalModelRecord]:
    """``builtin:toy`` and its drafters, ``builtin:toy-assistant`` and ``builtin:toy-draft``."""
    for folder in sorted(_MODELS.iterdir()):
        yield LocalModelRecord(name=folder.name, path=str(folder), format="reference")


@hookimpl
def polydraft_pairs() -> Iterable[PairRecord]:
    """The pairs. ``drafter="auto"`` takes the first one, the assistant."""
    drafters: dict[DrafterKind, str] = {"mtp": "builtin:toy-assistant", "draft-model": "builtin:toy-draft"}
    for kind, drafter in drafters.items():
        yield PairRecord(
            target="builtin:toy", drafter=drafter, kind=kind, format="reference", num_speculative_tokens={"*": 4}
        )
