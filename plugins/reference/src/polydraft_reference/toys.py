"""The shipped toy checkpoints, and requests that load them without the core's registry, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polydraft.contract import DrafterKind, LoadRequest, ModelSource, SpeculationPlan

from polydraft_reference.options import ReferenceOptions

__all__ = ["MODELS", "toy_request", "toy_source"]

MODELS = Path(__file__).with_name("models")
"""Folder of the shipped checkpoints."""

_DRAFTERS: dict[DrafterKind, str | None] = {"mtp": "toy-assistant", "draft-model": "toy-draft", "ngram": None}


def toy_source(name: str, **changes: Any) -> ModelSource:
    """A shipped checkpoint as the core would resolve it.

    Args:
        name: ``toy``, ``toy-assistant`` or ``toy-draft``.
        changes: Fields that replace those of its config.json.
    """
    path = MODELS / name
    config = {**json.loads((path / "config.json").read_text("utf-8")), **changes}
    return ModelSource(id=f"builtin:{name}", kind="builtin", path=path, format="reference", config=config)


def toy_request(
    kind: DrafterKind | None = "mtp",
    k: int = 4,
    *,
    agreement: float | None = None,
    picks_k: bool = False,
    **fields: Any,
) -> LoadRequest:
    """A request for ``builtin:toy`` with its drafter of one kind.

    Args:
        kind: ``mtp``, ``draft-model``, ``ngram``, or None for plain decoding.
        k: Tokens drafted per round; 0 where ``kind`` is None.
        picks_k: Whether the session picks k for each round, up to ``k``.
        agreement: Replaces the assistant's own; None: does not.
        fields: Further fields of the request, e.g. ``context_length``.
    """
    drafter = _DRAFTERS[kind] if kind else None
    plan = SpeculationPlan(
        kind=kind,
        drafter=toy_source(drafter) if drafter else None,
        num_speculative_tokens=k if kind else 0,
        max_speculative_tokens=k if kind and picks_k else None,
        chosen_by="caller",
    )
    options = ReferenceOptions(agreement=agreement)
    values = {"backend": "reference", "target": toy_source("toy"), "plan": plan, "engine_options": options}
    return LoadRequest(**{**values, **fields})
