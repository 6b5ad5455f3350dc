"""Copies what acceptance floors need from the built-in pairs' scores into the suite's data.

Run from the repository's root after the pairs were scored again: ``python conformance/scripts/copy_scores.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "builtin_pairs" / "scores.json"
COPY = ROOT / "conformance" / "src" / "polydraft_conformance" / "data" / "scores.json"
FIELDS = ("k", "new_tokens", "dtype", "transformers")


def reduced() -> dict[str, object]:
    """The part of the scores that the suite reads."""
    scores = json.loads(SOURCE.read_text(encoding="utf-8"))
    pairs = {name: {"drafter": pair["drafter"], "text": pair["text"]} for name, pair in scores["pairs"].items()}
    return {**{field: scores[field] for field in FIELDS}, "pairs": pairs}


if __name__ == "__main__":
    COPY.write_text(json.dumps(reduced(), indent=2) + "\n", encoding="utf-8")
