"""The entry point: cheap records. polydraft imports this module for every user, so no engine is imported here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from polydraft.contract import BackendRecord, LocalModelRecord, PairRecord, hookimpl

_MODELS = Path(__file__).with_name("models")


@hookimpl
def polydraft_backends() -> Iterable[BackendRecord]:
    """One engine, behind both interfaces."""
    for name, factory in (("markov", "stepping:SteppingMarkov"), ("markov-whole", "whole:WholeMarkov")):
        yield BackendRecord(
            name=name,
            factory=f"polydraft_markov.{factory}",
            summary="A Markov model of bytes: the example of a third-party plugin",
            formats=frozenset({"markov"}),
            drafter_kinds=frozenset({"draft-model", "ngram"} if name == "markov" else {"draft-model"}),
            engine="polydraft-markov",
            requires={"numpy": ">=2.0"},
            install_hint="pip install polydraft-markov",
            contract_version=1,
        )


@hookimpl
def polydraft_local_models() -> Iterable[LocalModelRecord]:
    """``builtin:markov`` and ``builtin:markov-draft``: what the conformance suite runs on."""
    for name in ("markov", "markov-draft"):
        yield LocalModelRecord(name=name, path=str(_MODELS / name), format="markov")


@hookimpl
def polydraft_pairs() -> Iterable[PairRecord]:
    """The draft model of ``builtin:markov``."""
    yield PairRecord(
        target="builtin:markov",
        drafter="builtin:markov-draft",
        kind="draft-model",
        format="markov",
        num_speculative_tokens={"*": 4},
    )
