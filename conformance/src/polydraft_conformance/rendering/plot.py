"""Acceptance by position in the draft, as a small inline SVG."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["acceptance_plot", "curves"]

_WIDTH, _HEIGHT = 320, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 10, 12, 34
_KINDS = ("mtp", "draft-model", "ngram", "eagle3", "dflash")


def curves(entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, list[float]]]:
    """Drafter kind -> (k, rate at each position), of the largest k that was run on the usual prompts.

    The rate at position i is accepted drafts at i / rounds (vLLM's definition).
    """
    found: dict[str, tuple[int, list[float]]] = {}
    for entry in entries:
        counts, rounds = entry.get("accepted_per_position"), entry.get("rounds")
        if not counts or not rounds or entry.get("prompts") != "window":
            continue
        kind, k = entry["kind"], entry["k"]
        if kind not in found or k > found[kind][0]:
            found[kind] = (k, [count / rounds for count in [*counts, *[0] * (k - len(counts))][:k]])
    return dict(sorted(found.items(), key=lambda item: _KINDS.index(item[0]) if item[0] in _KINDS else 9))


def acceptance_plot(title: str, found: Mapping[str, tuple[int, list[float]]]) -> str:
    """One line per drafter kind; the vertical axis is the share of rounds."""
    longest = max(len(rates) for _, rates in found.values())

    def x(position: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (position - 0.5) / longest

    def y(rate: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - rate)

    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title>",
    ]
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(rate):.1f}" y2="{y(rate):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(rate) + 3.5:.1f}" text-anchor="end">{rate:.0%}</text>')
    parts += [
        f'<text class="tick" x="{x(position):.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{position}</text>'
        for position in range(1, longest + 1)
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">position in the draft</text>'
    )
    for kind, (k, rates) in found.items():
        points = " ".join(f"{x(index):.1f},{y(rate):.1f}" for index, rate in enumerate(rates, start=1))
        parts.append(f'<polyline class="line {kind}" points="{points}"/>')
        parts += [
            f'<circle class="dot {kind}" cx="{x(index):.1f}" cy="{y(rate):.1f}" r="3">'
            f"<title>{kind}, k={k}: position {index} accepted in {rate:.1%} of the rounds</title></circle>"
            for index, rate in enumerate(rates, start=1)
        ]
    return "".join([*parts, "</svg>"])
