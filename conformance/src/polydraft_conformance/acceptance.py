"""Acceptance floors: what the built-in pairs scored when they were made, less a margin."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from polydraft_conformance.counting import logged
from polydraft_conformance.evidence import Speculation, speculation_of

if TYPE_CHECKING:
    from polydraft import Session
    from polydraft.contract import GenerationResult

    from polydraft_conformance.counting import SequenceLog
    from polydraft_conformance.pairs import Case, Pair

__all__ = ["MARGIN", "QUICK_MARGIN", "Floor", "floor_of", "is_known", "scored_speculation"]

MARGIN = 0.1
"""A backend may stay this share below a score: dtypes differ, and drafts are clipped at the end of the output."""
QUICK_STEP = 4
"""A quick run decodes every fourth of the prompts."""
QUICK_MARGIN = 0.35
"""A few prompts may lie this far below the mean of all: prompts differ that much in the pairs' own scores."""


@dataclass(frozen=True, slots=True)
class Floor:
    """A pair's score, and the prompts it was measured on."""

    score: float
    """Mean acceptance length, over all rounds of all prompts."""
    prompts: tuple[str, ...]
    new_tokens: int
    margin: float

    @property
    def mean_acceptance_length(self) -> float:
        """The least that passes."""
        # The margin applies to accepted drafts; the 1 is the bonus token, which every round emits.
        return 1 + (self.score - 1) * (1 - self.margin)


def floor_of(case: Case, *, quick: bool = False) -> Floor | None:
    """The floor of a built-in pair; None where no score is recorded for this drafter and k.

    Scores are the pairs' own (``scores.json`` of polydraft-builtin-pairs, copied by ``scripts/copy_scores.py``); their
    prompts are that package's.
    """
    scores = _scores()
    score = scores["pairs"].get(case.pair.name)
    if score is None or case.k != scores["k"] or case.drafter.removeprefix("builtin:") != score["drafter"]:
        return None
    try:
        from polydraft_builtin_pairs import prompts
    except ImportError:
        return None
    texts = tuple(prompt.text for prompt in prompts() if prompt.text is not None)
    return Floor(
        score["text"]["pooled_acceptance_length"],
        texts[::QUICK_STEP] if quick else texts,
        scores["new_tokens"],
        QUICK_MARGIN if quick else MARGIN,
    )


def is_known(pair: Pair) -> bool:
    """Whether a pair is polydraft's own: the properties of its models are known."""
    return pair.target == "builtin:toy" or (pair.target.startswith("builtin:") and pair.name in _scores()["pairs"])


def scored_speculation(session: Session, floor: Floor) -> Speculation:
    """Decode the floor's prompts greedily, and count what speculation did."""
    runs: list[tuple[GenerationResult, SequenceLog | None]] = []
    for text in floor.prompts:
        with logged(session) as logs:
            result = session.generate(text, max_new_tokens=floor.new_tokens)
        runs.append((result, logs[-1] if logs else None))
    return speculation_of(runs)


@cache
def _scores() -> dict[str, Any]:
    text = resources.files("polydraft_conformance").joinpath("data/scores.json").read_text(encoding="utf-8")
    scores: dict[str, Any] = json.loads(text)
    return scores
