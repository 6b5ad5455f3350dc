"""Failures that show on every one of several texts: what an engine's rounding may do once is no defect."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from polydraft_conformance.counting import stepping_engine

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Mapping

    from polydraft_conformance.bench import Bench

__all__ = ["repeated", "shows_ties"]

K = TypeVar("K", bound="Hashable")
_TEXTS = 3


def shows_ties(bench: Bench) -> bool:
    """Whether the engine shows the numbers that a near tie is known by: logits or log-probabilities."""
    return stepping_engine(bench.session) is not None or "logprobs" in bench.capabilities.sampling


def repeated(
    bench: Bench, attempt: Callable[[int, Collection[K]], Mapping[K, str]], texts: int | None = None
) -> dict[K, str]:
    """The failures of ``attempt`` that it has on each of several texts.

    Args:
        bench: Where the engine shows near ties, they have been judged, and one text suffices.
        attempt: Number of the text, from 0, and what to try: names of failures, empty: all -> what failed (a name that
            is the same for all texts) and how.
        texts: How many; None: as many as the engine needs.

    Returns:
        Name -> message of the first text.
    """
    first = dict(attempt(0, ()))
    for variant in range(1, texts or (1 if shows_ties(bench) else _TEXTS)):
        if not first:
            break
        again = attempt(variant, first.keys())
        first = {name: message for name, message in first.items() if name in again}
    return first
