"""Write the measurements into the Markdown files, between their markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- {name}: written by `python -m training card` -->", "<!-- end of {name} -->"


def put(file: Path, name: str, text: str) -> None:
    """Replace the text between the markers of `name`."""
    start, end = START.format(name=name), END.format(name=name)
    before, _, rest = file.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{file.name}: the markers of {name} are missing")
    file.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table; the keys of the rows are its head."""
    lines = [rows[0], ("---",) * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def acceptance(scores: dict[str, Any]) -> str:
    """Acceptance of every pair, and of other drafters for tiny-31b."""
    rows: list[dict[str, object]] = []
    for name, pair in scores["pairs"].items():
        theirs = pair["transformers_generate"]
        ours = theirs["ours_on_the_same"]
        rows.append(
            {
                "target": f"`{name}`",
                "mean acceptance length": pair["mean_acceptance_length"],
                "acceptance rate": pair["acceptance_rate"],
                "texts": pair["text"]["mean_acceptance_length"],
                "chats": pair["chat"]["mean_acceptance_length"],
                "first 32 tokens only": pair["first_32_tokens"]["mean_acceptance_length"],
                "k = 1 / 2 / 8": " / ".join(str(value) for value in pair["by_k"].values()),
                "Transformers' `generate` (ours on the same prompts)": f"{theirs['mean_acceptance_length']} ({ours})",
                "output equals plain decoding": f"{pair['same_as_plain']} of {scores['prompts']}",
            }
        )
    others: list[dict[str, object]] = [
        {
            "draft model": pair,
            "mean acceptance length": score["mean_acceptance_length"],
            "acceptance rate": score["acceptance_rate"],
        }
        for pair, score in scores["draft_model"].items()
    ]
    conditions = (
        f"Greedy, k = {scores['k']}, {scores['new_tokens']} new tokens, {scores['prompts']} prompts from held-out "
        f"modules, {scores['dtype']} on {scores['device']}, torch {scores['torch']}, Transformers "
        f"{scores['transformers']}. Prompts whose answer ends with its first token have no rounds and are left out of "
        "the averages."
    )
    return "\n\n".join((conditions, table(rows), table(others)))


def training(scores: dict[str, Any]) -> str:
    """Steps, time and losses of each model's training."""
    rows: list[dict[str, object]] = []
    for record in scores["training"].values():
        for role in ("target", "drafter"):
            one = record[role]
            rows.append(
                {
                    "model": f"`{one['name']}`",
                    "parameters": f"{one['parameters']:,}",
                    "steps": one["steps"],
                    "seconds": one["seconds"],
                    "last loss": one["losses"][-1],
                    "held-out loss": one.get("held_out_loss", ""),
                    "centroid recall": one.get("centroid_recall", ""),
                }
            )
    used = f"{record['device']}, torch {record['torch']}, Transformers {record['transformers']}"
    return f"All pairs were trained at the same time on one {used}.\n\n{table(rows)}"


def samples(scores: dict[str, Any]) -> str:
    """Samples of the targets' text."""
    return "\n\n".join(f"`{key}`\n\n```text\n{text}\n```" for key, text in scores["samples"].items())


def write_card() -> None:
    """Fill MODEL_CARD.md and training/README.md from `scores.json`."""
    scores = json.loads((ROOT / "scores.json").read_text(encoding="utf-8"))
    put(ROOT / "MODEL_CARD.md", "scores", acceptance(scores))
    put(ROOT / "MODEL_CARD.md", "training", training(scores))
    put(ROOT / "training" / "README.md", "samples", samples(scores))
