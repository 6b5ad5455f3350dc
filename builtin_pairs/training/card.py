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


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def acceptance(scores: dict[str, Any]) -> str:
    """Acceptance of every pair, and of other drafters for tiny-31b."""
    rows: list[tuple[object, ...]] = []
    for name, pair in scores["pairs"].items():
        theirs = pair["transformers_generate"]
        rows.append(
            (
                f"`{name}`",
                pair["mean_acceptance_length"],
                pair["acceptance_rate"],
                pair["text"]["mean_acceptance_length"],
                pair["chat"]["mean_acceptance_length"],
                pair["first_32_tokens"]["mean_acceptance_length"],
                " / ".join(str(value) for value in pair["by_k"].values()),
                f"{theirs['mean_acceptance_length']} ({theirs['ours_on_the_same']})",
                f"{pair['same_as_plain']} of {scores['prompts']}",
            )
        )
    head = (
        "target",
        "mean acceptance length",
        "acceptance rate",
        "texts",
        "chats",
        "first 32 tokens only",
        "k = 1 / 2 / 8",
        "Transformers' `generate` (ours on the same prompts)",
        "output equals plain decoding",
    )
    others: list[tuple[object, ...]] = [
        (pair, score["mean_acceptance_length"], score["acceptance_rate"])
        for pair, score in scores["draft_model"].items()
    ]
    conditions = (
        f"Greedy, k = {scores['k']}, {scores['new_tokens']} new tokens, {scores['prompts']} prompts from held-out "
        f"modules, {scores['dtype']} on {scores['device']}, torch {scores['torch']}, Transformers "
        f"{scores['transformers']}. Prompts whose answer ends with its first token have no rounds and are left out of "
        "the averages."
    )
    models = table(("draft model", "mean acceptance length", "acceptance rate"), others)
    return "\n\n".join((conditions, table(head, rows), models))


def training(scores: dict[str, Any]) -> str:
    """Steps, time and losses of each model's training."""
    rows: list[tuple[object, ...]] = []
    for name, record in scores["training"].items():
        for role in ("target", "drafter"):
            one = record[role]
            rows.append(
                (
                    f"`{one['name']}`",
                    f"{one['parameters']:,}",
                    one["steps"],
                    one["seconds"],
                    one["losses"][-1],
                    one.get("held_out_loss", ""),
                    one.get("centroid_recall", ""),
                )
            )
        if name == list(scores["training"])[-1]:
            used = f"{record['device']}, torch {record['torch']}, Transformers {record['transformers']}"
    head = ("model", "parameters", "steps", "seconds", "last loss", "held-out loss", "centroid recall")
    return f"All pairs were trained at the same time on one {used}.\n\n{table(head, rows)}"


def samples(scores: dict[str, Any]) -> str:
    """Samples of the targets' text."""
    parts = [f"`{key}`\n\n```text\n{text}\n```" for key, text in scores["samples"].items()]
    return "\n\n".join(parts)


def write_card() -> None:
    """Fill MODEL_CARD.md and training/README.md from `scores.json`."""
    scores = json.loads((ROOT / "scores.json").read_text(encoding="utf-8"))
    put(ROOT / "MODEL_CARD.md", "scores", acceptance(scores))
    put(ROOT / "MODEL_CARD.md", "training", training(scores))
    put(ROOT / "training" / "README.md", "samples", samples(scores))
