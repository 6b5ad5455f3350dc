"""Logits of the built-in pairs, recorded with the Transformers backend in float32, to compare other engines with.

A drafter that is given the wrong position, or the wrong layer's keys and values, hardly shows in acceptance; its logits
show it at once. ``scripts/record_logits.py`` makes the file again.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
from polydraft.verification import GreedySampler

from polydraft_conformance.primitives import logits_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polydraft.contract import SteppingEngine
    from polydraft.verification import Logits

    from polydraft_conformance.pairs import Case

__all__ = ["BEST", "Rows", "largest_gap", "recorded", "recorded_prompts", "rows_of"]

BEST = 20
"""How many of a row's largest logits are recorded."""
FILE = "data/reference_logits.json"


@dataclass(frozen=True, slots=True)
class Rows:
    """Logits of target and drafter after one context."""

    target: Logits
    """Shape (vocab,): of the token after the context."""
    drafts: tuple[int, ...]
    drafter: Logits | None
    """Shape (k, vocab): of the drafts after that token. None: the engine's drafter gives no logits."""


def rows_of(engine: SteppingEngine, context: Sequence[int], k: int) -> Rows:
    """Prefill a context and let the drafter propose after the token that the target chose, greedily."""
    sampler = GreedySampler(engine)
    with closing(engine.open_sequence()) as sequence:
        step = sequence.prefill(list(context), sampler, keep_logits=True)
        target = logits_of(step)[-1]
        proposal = sequence.propose(step.token_ids[-1], k, sampler, keep_logits=True)
    drafter = proposal.logits.numpy() if proposal.logits is not None else None
    return Rows(target, tuple(proposal.token_ids), drafter)


def best(row: Logits) -> dict[str, list[Any]]:
    """The largest logits of a row, JSON-ready."""
    # Stable: equal logits are in the order of their ids on every machine.
    order = np.argsort(-row, kind="stable")[:BEST]
    return {"token_ids": [int(token) for token in order], "logits": [round(float(row[token]), 6) for token in order]}


def largest_gap(row: Logits, record: dict[str, list[Any]]) -> float:
    """Largest difference from the recorded logits, at the recorded tokens."""
    found = row[np.asarray(record["token_ids"], dtype=np.int64)].astype(np.float64)
    return float(np.abs(found - np.asarray(record["logits"])).max())


def recorded(case: Case) -> list[dict[str, Any]]:
    """The records of a target and drafter, by context; empty without any."""
    records: list[dict[str, Any]] = _file()["pairs"].get(key_of(case), [])
    return records


def recorded_prompts(case: Case) -> list[dict[str, Any]]:
    """Prompts with their token ids; empty if none are recorded for the target."""
    prompts: list[dict[str, Any]] = _file()["prompts"].get(case.pair.target, [])
    return prompts


def key_of(case: Case) -> str:
    """``builtin:tiny-e2b + builtin:tiny-e2b-assistant``."""
    return f"{case.pair.target} + {case.drafter}"


@cache
def _file() -> dict[str, Any]:
    text = resources.files("polydraft_conformance").joinpath(FILE).read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
